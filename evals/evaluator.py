"""What `mnif eval` measures a signal with: an :class:`Evaluator` for each, known by the signal's name."""

from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from evals.arguments import EvalArguments
from evals.metrics.frechet import is_statistics
from mnif.models.io import load_component
from mnif.models.mnif_model import MNIFModel
from mnif.signals.registry import detect_signal, signal_of_model
from mnif.utils.errors import UserError
from mnif.utils.process import Processes

SUBJECTS = ("model", "samples", "bundle")
"""The flags that name what is measured."""

_MODULES = {"image": "evals.images", "voxels": "evals.voxels", "radiance": "evals.radiance"}
"""Signal → the module that registers its evaluator, imported when it is needed."""

_REGISTERED: dict[str, type["Evaluator"]] = {}


class Evaluator(ABC):
    """Measures a model, or samples, against a reference of one signal.

    A new one looks at what the flags name and raises :class:`mnif.utils.errors.UserError` if it cannot be measured. It
    does no work yet: that is left to :meth:`evaluate`, which is not called if ``metrics.json`` holds :meth:`inputs`
    already.

    Args:
        arguments: the flags. One of :data:`SUBJECTS` is given, ``reference`` is, and ``num_samples`` is filled in.
    """

    signal: ClassVar[str]

    def __init__(self, arguments: EvalArguments) -> None:
        self.arguments = arguments

    @abstractmethod
    def inputs(self) -> dict[str, str]:
        """Returns what the metrics depend on besides flags and version: a fingerprint of everything that is read.

        For example ``{"measured": sha256_of_model(model), "reference_fingerprint": reference.fingerprint()}``.
        """

    @abstractmethod
    def evaluate(self, processes: Processes) -> dict[str, Any]:
        """Measures, and writes pictures to ``arguments.output_dir`` from the main process alone.

        Every process calls it, and work can be shared out to them. What takes long can be resumed with
        :func:`mnif.utils.resumable.compute_in_chunks` in ``arguments.output_dir / ".parts"``, which is removed at the
        end.

        Returns:
            What goes to ``metrics.json``: floats by name (a metric's standard error is ``NAME_std``, its controls are
            ``NAME_floor``, ``NAME_gaussian`` …), a ``protocol`` object with all that another number must share to be
            comparable (data, split, resolution, counts, settings), and ``warnings``, a list of lines, where something
            makes the metrics doubtful. What processes other than the main one return is ignored.
        """


def register_evaluator(kind: type[Evaluator]) -> type[Evaluator]:
    """Makes an evaluator known by its ``signal`` to `mnif eval` of this process; a class decorator."""
    _REGISTERED[kind.signal] = kind
    return kind


def evaluator_of(arguments: EvalArguments) -> Evaluator:
    """Makes the evaluator of the signal that the flags are about.

    Raises:
        UserError: the reference or what is to be measured is not named, is of a signal without an evaluator, or
            cannot be measured.
    """
    if not arguments.reference:
        raise UserError("give --reference, the data set to compare with")
    if sum(getattr(arguments, flag) is not None for flag in SUBJECTS) != 1:
        raise UserError("give one of --model RUN/model, --samples FOLDER and --bundle BUNDLE")
    if arguments.model is not None:
        signal = signal_of_model(load_component(MNIFModel, arguments.model, "decoder")).name
        subject = f"--model {arguments.model}"
    elif arguments.bundle is not None or is_statistics(Path(arguments.reference)):
        signal, subject = "image", ""  # of other signals neither is measured
    else:
        signal, subject = detect_signal(arguments.reference), f"--reference {arguments.reference}"
    if signal in _MODULES:
        import_module(_MODULES[signal])
    if signal not in _REGISTERED:
        known = ", ".join({**_MODULES, **_REGISTERED})
        raise UserError(f"{subject} is of the signal {signal}; `mnif eval` measures {known}")
    return _REGISTERED[signal](arguments)
