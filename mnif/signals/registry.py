"""The signals by name, and which of them a data source is of; one of your own joins with :func:`register_signal`."""

import math
from importlib import import_module

from mnif.data.builtin import BUILTIN, builtin_signal
from mnif.data.source import DataSource
from mnif.models.mnif_model import MOST_POINTS, MNIFModel
from mnif.signals.base import Signal
from mnif.utils.errors import UserError
from mnif.utils.json_files import arguments_schema, check_type
from mnif.utils.pixels import as_axes

_BUILT_IN = {
    "image": "mnif.signals.image:Image",
    "voxels": "mnif.signals.voxels:Voxels",
    "radiance": "mnif.signals.radiance:RadianceField",
}

_REGISTERED: dict[str, type[Signal]] = {}


def register_signal(kind: type[Signal]) -> type[Signal]:
    """Makes a signal known by its ``name`` to every command of this process; usable as a class decorator."""
    _REGISTERED[kind.name] = kind
    return kind


def signal_class(name: str) -> type[Signal]:
    """Finds the class of a signal.

    Raises:
        UserError: there is no such signal.
    """
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name not in _BUILT_IN:
        raise UserError(f"signal {name!r}: must be one of {', '.join(sorted({*_BUILT_IN, *_REGISTERED}))}")
    module, _, kind = _BUILT_IN[name].partition(":")
    return getattr(import_module(module), kind)


def signal_of_model(decoder: MNIFModel) -> Signal:
    """Makes the signal a decoder was trained on, with its settings.

    Raises:
        UserError: there is no such signal, its settings are not what its constructor takes, or they are of other
            fields than the decoder's.
    """
    kind, settings = signal_class(decoder.config.signal), decoder.config.signal_settings
    where = f"signal_settings of the decoder ({kind.name})"
    check_type(settings, arguments_schema(kind), where)
    try:
        signal = kind(**settings)
        points = math.prod(as_axes(signal.grid_resolution, signal.dimensions))
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {error}") from None
    config = decoder.config
    fits = signal.channels <= config.channels and signal.dimensions == config.dimensions  # export pads channels
    if not fits or points > MOST_POINTS:
        raise UserError(f"{where}: they do not fit fields of {config.channels} channels on {config.dimensions} axes")
    return signal


def detect_signal(source: str) -> str:
    """Names the signal that recognizes a data source (:meth:`mnif.signals.base.Signal.recognizes`).

    Of several that do, the last one counts: posed views and meshes bring images along, as textures for one. Only of
    an ``.npy`` file, whose shape is all there is to go by, must one signal alone be left.

    Raises:
        UserError: the source is missing, or holds nothing that tells; the message says what it holds.
    """
    if (builtin := builtin_signal(source)) is not None:
        return builtin
    data, names = DataSource(source), list(dict.fromkeys([*_BUILT_IN, *_REGISTERED]))
    recognized = [name for name in names if signal_class(name).recognizes(data)]
    if len(recognized) == 1 or (recognized and data.array_shape is None):
        return recognized[-1]
    raise UserError(f"--data {source}: {_reason(data, names)}")


def _reason(data: DataSource, names: list[str]) -> str:
    """Says why no signal can be told from a data source."""
    if data.path.is_dir():
        held = ", ".join(f"{n} {suffix or 'without suffix'}" for suffix, n in data.file_suffixes.most_common(5))
        return f"no pictures, voxels, meshes or posed views; found {held or 'nothing'}"
    if not data.path.is_file():
        return f"no such folder, file or built-in set ({', '.join(sorted(BUILTIN))})"
    if data.suffix == ".npz":
        return (
            f'holds {", ".join(sorted(data.array_names)) or "nothing"}; "images", or one of "voxels", "occupancy" and '
            '"packed", is needed'
        )
    if data.array_shape is not None:
        return f"an array {list(data.array_shape)} may be anything; say which with --signal {' or '.join(names)}"
    return f"a {data.suffix or 'nameless'} file; .npz, .npy, .tar, .hdf5, .h5 or a folder is needed"
