"""The catalogues of the five furniture libraries: what there is, who made it and under which licence."""

import re
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

import numpy as np

CC0 = "CC0-1.0"
CC_BY = "CC-BY-3.0"
CC_BY_US = "CC-BY-3.0-US"

# The licence of a library as a whole (its LICENSE.TXT and the package's copyright file say the same), and whom to
# credit by that file; where it names nobody, each model has its own creator.
LIBRARIES = {
    "BlendSwap-CC-0": (CC0, ""),
    "BlendSwap-CC-BY": (CC_BY, ""),
    "KatorLegaz": (CC_BY_US, "Andrew Kator & Jennifer Legaz"),
    "Reallusion": (CC_BY_US, "Reallusion"),
    "Scopia": (CC_BY, "Emmanuel Puybaret / eTeks and Scopia Visual Interfaces Systems, s.l."),
}


@dataclass(frozen=True)
class Item:
    """One object of a catalogue.

    Attributes:
        id: a unique ASCII slug.
        name: as the catalogue has it, in English.
        category: likewise, such as ``Kitchen``.
        library: the stem of the ``.sh3f`` file.
        archive: that file.
        model: the OBJ file inside it.
        rotation: [3, 3]; turns the model so that y points up and z to the front.
        licence: an SPDX name.
        credit: who is to be named.
        source: the page the model comes from, or nothing.
    """

    id: str
    name: str
    category: str
    library: str
    archive: Path
    model: str
    rotation: np.ndarray
    licence: str
    credit: str
    source: str


def read_catalogues(package: Path) -> list[Item]:
    """All objects of an extracted ``sweethome3d-furniture`` package, in the order of the catalogues."""
    items = []
    for library in LIBRARIES:
        archive = next(iter(sorted(package.rglob(f"{library}.sh3f"))), None)
        if archive is None:
            raise SystemExit(f"{package}: no {library}.sh3f in here; is this the extracted package?")
        items.extend(_read_catalogue(archive))
    ids = [item.id for item in items]
    if len(set(ids)) < len(ids):
        raise SystemExit(f"ids occur twice: {sorted({id for id in ids if ids.count(id) > 1})}")
    return items


def _read_catalogue(archive: Path) -> list[Item]:
    fields: dict[int, dict[str, str]] = {}
    with ZipFile(archive) as file:
        text = file.read("PluginFurnitureCatalog.properties").decode("latin-1")
        for key, number, value in re.findall(r"^(\w+)#(\d+)=(.*?)\r?$", text, re.MULTILINE):
            # Java writes characters outside Latin-1 as \u20ac.
            value = re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), value.strip())
            fields.setdefault(int(number), {})[key] = value
        return [_item(archive, file, fields[number]) for number in sorted(fields)]


def _item(archive: Path, file: ZipFile, field: dict[str, str]) -> Item:
    library = archive.stem
    licence, credit = LIBRARIES[library]
    model = field["model"].lstrip("/")
    own_licence, source = _licence_note(file, model)
    if own_licence == CC_BY and licence == CC0:
        # Two models of the CC0 library come with a note that asks for attribution; the stricter word counts.
        licence = CC_BY
    rotation = np.array(field.get("modelRotation", "1 0 0 0 1 0 0 0 1").split(), dtype=np.float64).reshape(3, 3)
    return Item(
        id=_slug(f"{library}-{field['id'].split('#')[-1]}"),
        name=field["name"],
        category=field["category"],
        library=library,
        archive=archive,
        model=model,
        rotation=rotation,
        licence=licence,
        credit=credit or field["creator"],
        source=source,
    )


def _licence_note(file: ZipFile, model: str) -> tuple[str, str]:
    """The licence and the page that the note beside a model names, each empty if it names none."""
    folder = model.rsplit("/", 1)[0] + "/"
    for name in sorted(file.namelist()):
        if name.startswith(folder) and name.lower().endswith((".txt", ".html")):
            note = file.read(name).decode("utf-8", errors="replace")
            page = re.search(r"blendswap\.com/(?:blends/view|blend)/(\d+)", note)
            source = f"https://www.blendswap.com/blend/{page[1]}" if page else ""
            if re.search(r"Creative\s+Commons\s+Attribution", note):
                return CC_BY, source
            if re.search(r"Creative\s+Commons\s+Zero|CC-?0", note, re.IGNORECASE):
                return CC0, source
    return "", ""


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
