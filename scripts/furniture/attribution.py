"""The page that says who made the furniture and under which licence."""

from furniture.catalogue import CC0, CC_BY, CC_BY_US, Item

_HEAD = """# Where the furniture comes from

`furniture.npz` and `furniture_views.npz` are made by `scripts/make_furniture.py` from the Debian package
[`sweethome3d-furniture`](https://packages.debian.org/sid/sweethome3d-furniture) 1.8, that is, from the libraries of 3D
models of [Sweet Home 3D](https://www.sweethome3d.com/importModels.jsp), cleaned, converted to OBJ and collected by
Emmanuel Puybaret / eTeks.

**What was changed.** `furniture.npz`: every model was turned upright, centred, scaled, and reduced to a grid of
32×32×32 voxels, its inside filled; materials and textures are gone. `furniture_views.npz`: the CC0 models were drawn
from 24 sides at 64×64 pixels with a simple light of our own. No author endorses this project or its use of the models.

**Licences.** They cover these two files and not the code, which is Apache-2.0.

| licence | objects | libraries |
|---|---|---|
{licences}

Credit goes to whom the licence file of a library asks to name, and for Blend Swap to the creator in the catalogue.
The library BlendSwap-CC-0 holds {own} objects whose own notes say CC-BY 3.0; they are treated as CC-BY here, so that
`furniture_views.npz` holds nothing but CC0: {own_names}.
Whoever passes `furniture.npz` on passes this page on with it. Names of products and makers are their owners' marks.

| id | name | credit | licence | in the views | source |
|---|---|---|---|---|---|
"""

_PAGES = {
    CC0: ("CC0 1.0", "https://creativecommons.org/publicdomain/zero/1.0/"),
    CC_BY: ("CC-BY 3.0", "https://creativecommons.org/licenses/by/3.0/"),
    CC_BY_US: ("CC-BY 3.0 US", "https://creativecommons.org/licenses/by/3.0/us/"),
}


def attribution(items: list[Item]) -> str:
    """The page in Markdown, one line of its table per object."""
    licences = []
    for licence, (name, page) in _PAGES.items():
        found = [item for item in items if item.licence == licence]
        libraries = ", ".join(sorted({item.library for item in found}))
        licences.append(f"| [{name}]({page}) | {len(found)} | {libraries} |")
    own = [item for item in items if item.library == "BlendSwap-CC-0" and item.licence != CC0]
    head = _HEAD.format(
        licences="\n".join(licences), own=len(own), own_names=", ".join(f"`{item.id}`" for item in own)
    )
    return head + "".join(_line(item) for item in items)


def _line(item: Item) -> str:
    source = f"[{item.library}]({item.source})" if item.source else item.library
    shown = "yes" if item.licence == CC0 else ""
    cells = (item.id, item.name, item.credit, _PAGES[item.licence][0], shown, source)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
