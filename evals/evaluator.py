"""The rooms of `mnif eval`: a module for each signal that measures it, all entered through the same two doors.

A room is a module with two functions::

    def of_model(asked: EvalArguments) -> Measurement: ...
    def of_samples(asked: EvalArguments) -> Measurement: ...

``of_model`` is called where ``asked.model`` is a model folder of the room's signal, with or without a prior;
``of_samples`` where ``asked.samples`` names samples and ``asked.reference`` is data of the room's signal. Both look at
what they were given, raise :class:`mnif.utils.errors.UserError` if it cannot be measured, and do no work yet: that is
left to the measurement they return, which is not asked for if ``metrics.json`` holds these inputs already.
``asked.num_samples`` is filled in by then. What takes long can be shared out and resumed with
:func:`mnif.utils.resumable.compute_in_chunks`, in ``asked.output_dir / ".parts"``, which is removed at the end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from mnif.utils.errors import UserError
from mnif.utils.process import Processes

_ROOMS = {"image": "evals.images", "voxels": "evals.voxels", "radiance": "evals.radiance"}
"""Signal → module; a room that is added here is a room `mnif eval` knows."""


@dataclass(frozen=True)
class Measurement:
    """What a room has to measure.

    Attributes:
        inputs: what the figures depend on besides flags and version: fingerprints of everything that is read, by name,
            such as ``{"measured": sha256_of_folder(model), "reference_fingerprint": reference.fingerprint()}``.
        figures: measures. It is called in every process (:class:`mnif.utils.process.Processes`), may share work out to
            them, writes pictures to ``asked.output_dir`` from the main process alone, and returns there what goes to
            ``metrics.json``: floats by name (printed as a table too; a figure's spread is ``NAME_std``, its controls
            are ``NAME_floor``, ``NAME_gaussian`` …), a ``protocol`` object with all that another number must share to
            be comparable (data, split, resolution, both counts, settings), and ``warnings``, a list of lines, where
            something makes the figures doubtful. What other processes return is ignored.
    """

    inputs: dict[str, str]
    metrics: Callable[[Processes], dict[str, Any]]


def room_of(signal: str, what: str) -> ModuleType:
    """The module that measures a signal.

    Args:
        signal: its name.
        what: what was found to be of this signal, for the message.

    Raises:
        UserError: there is no such room.
    """
    if signal not in _ROOMS:
        raise UserError(f"{what} is of the signal {signal}; `mnif eval` measures {', '.join(_ROOMS)}")
    return import_module(_ROOMS[signal])
