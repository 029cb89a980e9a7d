"""The built-in set ``emoji``: what five vendors draw for the same code points.

The drawings are the SVG of iconify's packages on the npm registry. These are downloaded once, each with the content
that it had when this was written, and drawn once by resvg. What belongs together is told by code point over all
vendors (:func:`emoji_design`), so that no design is learned in one hand and tested in another.
"""

import json
import os
import tarfile
from base64 import b64decode
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import msgspec
import numpy as np
from PIL import Image

from mnif.data.arrays import memmap_cached
from mnif.utils.errors import UserError, require
from mnif.utils.files import cache_folder
from mnif.utils.process import progress_bar
from mnif.utils.published import PublishedFile, downloaded

EMOJI_PIXELS = 64  # per axis of a drawing


@dataclass(frozen=True)
class Vendor:
    """Who draws, and the package of the drawings.

    Attributes:
        package: its name under ``@iconify-json`` on the npm registry.
        version: the one that is read.
        size: of the package in bytes.
        integrity: of the package, SHA-512 in base 64, as ``npm view`` tells it.
        licence: as the Hugging Face hub names it.
        credit: in words.
    """

    package: str
    version: str
    size: int
    integrity: str
    licence: str
    credit: str

    @property
    def file(self) -> PublishedFile:
        """The package as a file of the registry."""
        name, digest = f"{self.package}-{self.version}.tgz", b64decode(self.integrity).hex()
        return PublishedFile(name, self.size, digest, f"{_registry()}/@iconify-json/{self.package}/-/{name}")


VENDORS = {
    "noto": Vendor(
        package="noto",
        version="1.2.9",
        size=3_102_958,
        integrity="DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        licence="apache-2.0",
        credit="Noto Emoji by Google, Apache-2.0",
    ),
    "fluent": Vendor(
        package="fluent-emoji-flat",
        version="1.2.6",
        size=1_172_438,
        integrity="RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        licence="mit",
        credit="Fluent Emoji by Microsoft, MIT",
    ),
    "twemoji": Vendor(
        package="twemoji",
        version="1.2.5",
        size=1_555_888,
        integrity="uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        licence="cc-by-4.0",
        credit="Twemoji by Twitter, Inc. and other contributors, CC BY 4.0",
    ),
    "fxemoji": Vendor(
        package="fxemoji",
        version="1.2.2",
        size=1_034_876,
        integrity="UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
        licence="apache-2.0",
        credit="FxEmojis by Mozilla, Apache-2.0",
    ),
    "emojione": Vendor(
        package="emojione",
        version="1.2.3",
        size=687_690,
        integrity="T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        licence="cc-by-4.0",
        credit="Emoji One 2.3, CC BY 4.0",
    ),
}
"""By the name that the user gives."""

# Code points of the names in packages that tell none: vendor → name → code points.
_CODE_POINTS = Path(__file__).parent / "files" / "emoji_code_points.json"

_SKIN_TONES = {f"1f3f{tone}" for tone in "bcdef"}
# What makes no design of its own in a sequence: joiner, presentation, keycap, signs of gender, "facing right".
_MARKS = {"200d", "fe0f", "20e3", "2640", "2642", "27a1"}
_PERSON, _CHILD, _COUPLE, _FAMILY = "1f9d1", "1f9d2", "1f46b", "1f46a"
# A man and a woman are a person, and so on: code points that differ in gender alone, by the one that stands for them.
_ONE_GENDER = {
    **dict.fromkeys(("1f468", "1f469"), _PERSON),
    **dict.fromkeys(("1f466", "1f467"), _CHILD),
    **dict.fromkeys(("1f474", "1f475"), "1f9d3"),  # older person
    **dict.fromkeys(("1f46c", "1f46d"), _COUPLE),
    **dict.fromkeys(("1f934", "1f478"), "1fac5"),  # person with crown
    **dict.fromkeys(("1f930", "1fac3"), "1fac4"),  # pregnant person
    "1f57a": "1f483",  # dancer
    "1f936": "1f385",  # Santa Claus
}
_SPELLED_OUT = {
    (_PERSON, "1f91d", _PERSON): _COUPLE,
    (_PERSON, "2764", _PERSON): "1f491",  # couple with heart
    (_PERSON, "2764", "1f48b", _PERSON): "1f48f",  # kiss
    (_PERSON, "1f430", _PERSON): "1f46f",  # people with bunny ears, a skin tone for each, as below
    (_PERSON, "1faef", _PERSON): "1f93c",  # people wrestling
    (_PERSON, "1f384"): "1f385",
    ("1faf1", "1faf2"): "1f91d",  # handshake
}

T = TypeVar("T")


class _Icon(msgspec.Struct):
    body: str
    left: float = 0
    top: float = 0
    width: float | None = None
    height: float | None = None


class _IconSet(msgspec.Struct):
    icons: dict[str, _Icon]
    width: float = 16
    height: float = 16


def is_emoji(source: str) -> bool:
    """Whether a source is ``emoji`` or ``emoji:VENDOR``."""
    return source.partition(":")[0] == "emoji"


def emoji_vendors(source: str) -> list[str]:
    """Names the vendors that a source asks for.

    Raises:
        UserError: there is no such vendor.
    """
    _, colon, vendor = source.partition(":")
    if colon and vendor not in VENDORS:
        raise UserError(f'--data {source}: no vendor "{vendor}"; choose one of {", ".join(VENDORS)}')
    return [vendor] if colon else [*VENDORS]


def emoji_design(code_points: str) -> str:
    """Names the design of an emoji: its code points without skin tone, gender and the way a person faces.

    Args:
        code_points: hexadecimal, with dashes between them.

    Returns:
        Code points likewise, the same for all variants of a design. Families of all kinds are one design.
    """
    parts = [part for part in code_points.split("-") if part != "fe0f"]
    if len(parts) > 1:
        parts = [part for part in parts if part not in _SKIN_TONES | _MARKS]
    elif parts[0] in _SKIN_TONES:
        return min(_SKIN_TONES)
    parts = [_ONE_GENDER.get(part, part) for part in parts]
    if len(parts) > 1 and set(parts) <= {_PERSON, _CHILD}:
        return _FAMILY
    return _SPELLED_OUT.get(tuple(parts), "-".join(parts))


def emoji_drawings(source: str) -> tuple[list[str], list[str], np.ndarray]:
    """Draws the emoji of all vendors, once: they are kept in the cache folder.

    Args:
        source: ``emoji`` or ``emoji:VENDOR``, for messages.

    Returns:
        N names, ``VENDOR-CODE-POINTS``; N names of designs; [N, 64, 64, 4] uint8, RGBA and memory-mapped. Some are
        drawn the same.

    Raises:
        UserError: resvg is missing, or a package is not there and cannot be downloaded.
    """
    require("resvg-py", "emoji", f"--data {source}", "resvg_py")
    packages = {vendor: _package(about.file) for vendor, about in VENDORS.items()}
    names = {vendor: _code_points(vendor, package) for vendor, package in packages.items()}
    ids = [f"{vendor}-{codes}" for vendor, known in names.items() for codes in known]

    def fill(drawings: np.ndarray) -> None:
        drawn = (one for vendor, package in packages.items() for one in _drawn(package, names[vendor].values()))
        rows = progress_bar(drawn, desc="drawing emoji", total=len(ids), unit="emoji", leave=False)
        for row, drawing in enumerate(rows):
            drawings[row] = drawing

    key = ["emoji", *(package.name for package in packages.values()), f"resvg-py {version('resvg-py')}", *ids]
    drawings = memmap_cached((len(ids), EMOJI_PIXELS, EMOJI_PIXELS, 4), fill, key, keep=True)
    return ids, [emoji_design(codes) for known in names.values() for codes in known], drawings


def _registry() -> str:
    """Finds the address of the npm registry: npm's own variable names a mirror; npm does not mind its case."""
    named = (value for name, value in os.environ.items() if name.lower() == "npm_config_registry")
    return next(filter(None, named), "https://registry.npmjs.org").rstrip("/")


def _package(file: PublishedFile) -> Path:
    """Finds a package in the cache folder, or downloads it; its content is the published one."""
    folder = cache_folder() / "emoji"
    path = folder / file.name
    if path.is_file():
        file.check(path, "remove it, and it is downloaded again")
        return path
    address = urlsplit(file.url)
    if address.scheme not in ("http", "https") or not address.hostname or "@" in address.netloc:
        raise UserError("npm_config_registry: must be https://HOST or https://HOST/PATH, without user and password")
    instead = f"put it there; {file.url} has it; npm_config_registry names a mirror"
    return downloaded(file, folder, "choose another registry by npm_config_registry, or none", instead)


def _code_points(vendor: str, package: Path) -> dict[str, str]:
    """Lists what a package draws: code points → name; what its makers have withdrawn has none and is left out."""
    told = _member(package, "chars.json", dict[str, str])
    return told or {codes: name for name, codes in json.loads(_CODE_POINTS.read_text())[vendor].items()}


def _member(package: Path, name: str, kind: type[T]) -> T:
    """Reads a JSON file of a package. The content of the package is known by its hash, so nothing in it is hostile."""
    with tarfile.open(package, "r:gz") as archive:
        for member in archive:
            if member.name == f"package/{name}" and (file := archive.extractfile(member)) is not None:
                return msgspec.json.decode(file.read(), type=kind)
    raise UserError(f"{package}: holds no {name}")


def _drawn(package: Path, names: Iterable[str]) -> Iterator[np.ndarray]:
    """Draws icons of a package by name: [64, 64, 4] uint8; those that are no squares lie in the middle."""
    import resvg_py

    known = _member(package, "icons.json", _IconSet)
    for icon in (known.icons[name] for name in names):
        box = (icon.left, icon.top, icon.width or known.width, icon.height or known.height)
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{EMOJI_PIXELS}" height="{EMOJI_PIXELS}" viewBox="{" ".join(map(str, box))}">{icon.body}</svg>'
        )
        png = resvg_py.svg_to_bytes(svg, skip_system_fonts=True)
        yield np.asarray(Image.open(BytesIO(png)).convert("RGBA"))
