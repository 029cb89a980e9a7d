"""What every comparison of runs does: it trains each at equal compute, or takes it as it is, and measures it once.

`mnif compare-fit` and `mnif pilot` choose the runs and tell what came out; a run of the same settings has the same
name in both, so that one can take over what the other has trained (``--runs_dir``).
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

from mnif.data.dataset import Dataset, Split
from mnif.training.run_record import flags_as_json, for_further_runs, read_metrics_log
from mnif.utils.devices import default_device
from mnif.utils.errors import UserError, check_at_least
from mnif.utils.files import write_json
from mnif.utils.flag_files import Flags, write_config
from mnif.utils.json_files import read_json
from mnif.utils.output_folders import check_output_folder, output_folder_of
from mnif.utils.pixels import limit_image_pixels
from mnif.utils.process import command_line

if TYPE_CHECKING:
    from mnif.data.batches import ArrayDataset
    from mnif.latents.inference import LatentInit
    from mnif.models.mnif_model import MNIFModel
    from mnif.signals.base import Signal

BUDGETS = ("train_seconds", "max_train_steps", "num_train_epochs")
"""The flags of which one says what every run gets."""

_LONGEST_MEASUREMENT = 10.0  # seconds of throw-away steps
_BETWEEN_LOOKS = 5  # steps between two looks at the clock; the first ones are the warm-up
_NEVER = 1_000_000_000  # steps
_VALIDATIONS = 8  # of a run at least, so that its curve has a shape, unless they would take long:
_VALIDATED = 1024  # instances a validation looks at, at most; each costs about a third of one in a step


@dataclass(kw_only=True)
class ComparisonFlags:
    """What every run gets, and what it is measured on."""

    train_seconds: float | None = None
    """Seconds of optimizer steps that each run gets on this machine, unless a number of steps is given."""
    probes: int = 256
    """Held-out instances that robustness is measured on, at most."""
    runs_dir: Path | None = None
    """Where the run folders lie, if another comparison is to share them; default: the output folder."""


@dataclass(frozen=True)
class Run:
    """One way of learning that is compared.

    Attributes:
        name: of the run and of its folder.
        variant: its settings as ``flag=value,flag=value``, or "".
        augmented: flags of its that change instances at random.
        arguments: of its `mnif fit`.
    """

    name: str
    variant: str
    augmented: list[str]
    arguments: Any


@dataclass(frozen=True)
class StageOne:
    """`mnif fit`, which stands above the engine and so is handed to it.

    Attributes:
        fit: trains the run of these arguments, or finds it finished.
        steps: optimizer steps of these arguments on these instances, one after the other, which leave nothing.
    """

    fit: Callable[[Any], None]
    steps: Callable[[Any, Signal, Dataset], Generator[int]]


def settle_budget(flags: Any, given: Mapping[str, Any], default_seconds: float) -> None:
    """Leaves one budget in ``flags``: the one that is given, or so many seconds for each run.

    Raises:
        UserError: several are given, or it is no time.
    """
    budgets = [name for name in BUDGETS if name in given]
    if len(budgets) > 1:
        raise UserError(f"--{budgets[0]} and --{budgets[1]}: give one of them; it is what every run gets")
    if flags.dry_run:
        raise UserError("--dry_run: is for `mnif fit`, once for each run")
    if flags.train_seconds is not None and not 0 < flags.train_seconds < float("inf"):
        raise UserError(f"--train_seconds {flags.train_seconds:g}: must be above 0")
    check_at_least(1, probes=flags.probes)
    if not budgets:
        flags.train_seconds = default_seconds
    if "num_train_epochs" not in budgets:
        flags.num_train_epochs = None  # a preset's


@contextlib.contextmanager
def opened(
    flags: Any,
    command: str,
    runs: Sequence[Run],
    stage_one: StageOne,
    check: Callable[[Engine], None] = lambda engine: None,
) -> Iterator[Engine]:
    """Reads the data and opens the output folder for a comparison, once nothing speaks against it.

    Args:
        flags: what all runs have in common, with :class:`ComparisonFlags`.
        command: by its name on the command line.
        runs: that will be trained.
        stage_one: what trains them.
        check: refuses what the data speak against, before anything is written.

    Raises:
        UserError: the data cannot be read or one side of the split is empty, or a folder is another command's.
    """
    from mnif.signals.registry import signal_class
    from mnif.training.loop import check_machine

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("several processes cannot be compared; run it without torchrun")
    check_machine(flags)
    check_output_folder(flags.output_dir, command)
    for run in runs:
        check_output_folder(run.arguments.output_dir, "fit")
    limit_image_pixels(flags.max_image_pixels)
    data = signal_class(flags.signal).load(flags.data, asdict(flags))
    splits = data.split(flags.held_out_fraction, flags.test_fraction)
    train_data, held_data = (data.rows(splits == split) for split in (Split.TRAIN, Split.HELD_OUT))
    for split, flag in ((train_data, "lower"), (held_data, "raise")):
        if not len(split):
            raise UserError(
                f"--data {flags.data}: {len(train_data)} to learn from and {len(held_data)} held out; "
                f"{flag} --held_out_fraction, both sides are needed"
            )
    engine = Engine(flags, stage_one, data, train_data, held_data)
    check(engine)
    with output_folder_of(flags.output_dir, command):
        write_config(flags.output_dir / "config.yaml", {command: _for_further_comparisons(flags)})
        yield engine


def _for_further_comparisons(flags: Any) -> Flags:
    """What ``--config`` reads: of the budgets that which counts."""
    counts = "train_seconds" if flags.train_seconds is not None else "max_train_steps"
    counts = "num_train_epochs" if flags.num_train_epochs is not None else counts
    unused = {*BUDGETS, *(("method",) if hasattr(flags, "methods") else ())} - {counts}
    return {name: value for name, value in for_further_runs(flags_as_json(flags)).items() if name not in unused}


class Speed(msgspec.Struct):
    """What ``speed.json`` holds for a number of seconds: of one step, and how many steps fit."""

    seconds_per_step: Annotated[float, Meta(gt=0)]
    max_train_steps: Annotated[int, Meta(ge=1)]


class Measured(msgspec.Struct):
    """What a run's ``measured.json`` holds: of what, and the figures."""

    subject: dict[str, Any]
    figures: dict[str, float]


@dataclass(frozen=True)
class Subject:
    """What figures of a run are measured with.

    Attributes:
        folder: of the run.
        decoder: its bases, on the device.
        signal: what the rows are.
        latent_init: finds latents; None searches from zero.
        probes: held-out instances, the same for every run.
        steps: that refine a latent.
        seed: of what is drawn at random, the same for every run.
    """

    folder: Path
    decoder: MNIFModel
    signal: Signal
    latent_init: LatentInit
    probes: ArrayDataset
    steps: int
    seed: int


@dataclass(frozen=True)
class Engine:
    """Trains runs on one data set and measures them.

    Attributes:
        flags: what all runs have in common.
        stage_one: what trains them.
        data: all instances.
        train_data: those learned from.
        held_data: those held out.
    """

    flags: Any
    stage_one: StageOne
    data: Dataset
    train_data: Dataset
    held_data: Dataset

    def signal(self, arguments: Any = None) -> Signal:
        """Makes the signal of a run's arguments, or of those in common."""
        from mnif.signals.registry import signal_class

        return signal_class(self.flags.signal).from_data(self.data, asdict(arguments or self.flags))

    def result(self, run: Run) -> dict[str, Any]:
        """Trains a run, or takes it as it is, and gives everything that is known of it.

        Raises:
            UserError: its folder holds another run, or training diverges.
        """
        print(f"== {run.name}", flush=True)
        folder, arguments = run.arguments.output_dir, run.arguments
        speed = self._planned(run) if self.flags.train_seconds is not None else None
        _forget_peak_memory()
        self.stage_one.fit(arguments)
        last = [row for row in read_metrics_log(folder / "metrics.jsonl") if row["stage"] == "fit"][-1]
        return {
            **read_json(folder / "metrics.json"),
            **self.measured(run, "measured.json", found_again),
            "name": run.name,
            "method": arguments.method,
            "variant": run.variant,
            "folder": str(folder),
            "augmented": run.augmented,
            "refinement_steps": arguments.refinement_steps,
            "train_steps": last["step"],
            "train_seconds": last["seconds"],  # validations included, unlike in seconds_per_step
            "seconds_per_step": speed,
            "images_per_second": self._batch(arguments) * last["step"] / last["seconds"],
        }

    def measured(
        self,
        run: Run,
        name: str,
        measure: Callable[[Subject], dict[str, float]],
        further: Mapping[str, Any] = MappingProxyType({}),
    ) -> dict[str, float]:
        """Measures a trained run, or takes the file ``name`` in its folder if it is of the same model and probes.

        Args:
            run: that is trained.
            name: of the file.
            measure: gives figures by name.
            further: what they depend on besides.
        """
        import torch

        from mnif.data.batches import array_dataset, evenly_spaced
        from mnif.latents.inference import load_latent_init
        from mnif.models.io import load_component
        from mnif.models.mnif_model import MNIFModel

        folder, arguments = run.arguments.output_dir, run.arguments
        decoder = load_component(MNIFModel, folder / "model", "decoder").to(default_device())
        probes = self.held_data.rows(evenly_spaced(len(self.held_data), self.flags.probes))
        subject = {
            "decoder": decoder.fingerprint(),
            "probes": probes.fingerprint(),
            "seed": self.flags.seed,
            "refinement_steps": arguments.refinement_steps,
            "device": default_device().type,
            "threads": torch.get_num_threads(),
        } | dict(further)
        path = folder / name
        if path.exists() and (stored := read_json(path, Measured)).subject == subject:
            print(f"{path}: measured before; nothing to do")
            return stored.figures
        signal = self.signal(arguments)
        latent_init = load_latent_init(folder / "model", decoder, signal, arguments.method)
        latent_init = None if latent_init is None else latent_init.to(default_device())
        rows, steps = array_dataset(probes.arrays()), arguments.refinement_steps
        figures = measure(Subject(folder, decoder, signal, latent_init, rows, steps, self.flags.seed))
        write_json(path, {"subject": subject, "figures": figures})
        return figures

    def summary(self, results: list[dict[str, Any]], further_conditions: Sequence[str] = ()) -> dict[str, Any]:
        """Gives what a comparison's JSON says: of data, budget, machine, conditions, controls, and the runs."""
        import torch

        from mnif.comparison.robustness import CONDITIONS, conditions_of
        from mnif.data.batches import array_dataset
        from mnif.latents.pca import baseline_metrics

        flags, signal = self.flags, self.signal()
        train, held_out = (array_dataset(part.arrays()) for part in (self.train_data, self.held_data))
        return {
            "command": command_line(),
            "data": flags.data,
            "unit": signal.noun,
            "instances": {
                "train": len(self.train_data),
                "heldout": len(self.held_data),
                "probes": min(len(self.held_data), flags.probes),
            },
            "train_seconds": flags.train_seconds,
            "max_train_steps": flags.max_train_steps if flags.train_seconds is None else None,
            "num_train_epochs": flags.num_train_epochs,
            "seed": flags.seed,
            "machine": {"device": default_device().type, "threads": torch.get_num_threads()},
            "conditions": {name: CONDITIONS[name] for name in [*conditions_of(signal), *further_conditions]},
            "controls": baseline_metrics(signal, train, held_out, results),
            "runs": results,
        }

    def _planned(self, run: Run) -> float:
        """Sets the run's number of steps to what fits into the seconds asked for; gives the seconds of a step.

        Schedules need the number of steps beforehand. It is kept beside the run, because a second measurement would
        give another number and so another run.
        """
        seconds, arguments = self.flags.train_seconds, run.arguments
        path, key = arguments.output_dir / "speed.json", f"{seconds:g}"
        kept: dict[str, Speed] = (
            read_json(path, dict[str, Speed]) if path.exists() and arguments.resume_from_checkpoint != "no" else {}
        )
        if key not in kept:
            measured = self._seconds_per_step(arguments, min(seconds / 20, _LONGEST_MEASUREMENT))
            kept[key] = Speed(measured, max(round(seconds / measured), 1))
            write_json(path, msgspec.to_builtins(kept))
        arguments.max_train_steps = kept[key].max_train_steps
        steps_worth = min(_VALIDATED, len(self.data)) / 3 / self._batch(arguments)
        often = max(arguments.max_train_steps // _VALIDATIONS, round(10 * steps_worth), 1)
        arguments.validation_steps = min(arguments.validation_steps, often)
        measured = kept[key].seconds_per_step
        print(f"{1000 * measured:.3g} ms a step: {arguments.max_train_steps} steps in {seconds:g} s", flush=True)
        return measured

    def _batch(self, arguments: Any) -> int:
        """Counts the instances that an optimizer step learns from."""
        return min(arguments.train_batch_size, len(self.train_data)) * arguments.gradient_accumulation_steps

    def _seconds_per_step(self, arguments: Any, seconds: float) -> float:
        """Wall seconds of one optimizer step, loading included; validation and checkpoints are not.

        The real training loop runs in a temporary folder until the clock has been looked at often enough: for so many
        seconds after the warm-up, and five steps at least.

        Raises:
            UserError: training diverges within these steps.
        """
        with tempfile.TemporaryDirectory() as folder:
            short = replace(
                arguments,
                output_dir=Path(folder),
                max_train_steps=_NEVER,
                checkpointing_steps=_NEVER,
                validation_steps=_NEVER,
                resume_from_checkpoint="latest",
                report_to=None,
            )
            silence = io.StringIO()  # the loop would show a bar without an end
            with (
                contextlib.redirect_stdout(silence),
                contextlib.redirect_stderr(silence),
                contextlib.closing(self.stage_one.steps(short, self.signal(arguments), self.train_data)) as steps,
            ):
                started, counted, elapsed = _time_after(steps), 0, 0.0
                while elapsed < seconds:
                    elapsed = _time_after(steps) - started
                    counted += _BETWEEN_LOOKS
        return elapsed / counted


def found_again(subject: Subject) -> dict[str, float]:
    """Measures how well probes are found when they are spoilt, and how long finding takes."""
    from mnif.comparison.robustness import robustness, seconds_per_instance

    decoder, signal, finder, rows = subject.decoder, subject.signal, subject.latent_init, subject.probes
    return {
        "latent_dim": decoder.config.latent_dim,
        **robustness(decoder, signal, rows, finder, subject.steps, subject.seed),
        **seconds_per_instance(decoder, signal, rows, finder, subject.steps),
    }


def _time_after(steps: Iterator[int]) -> float:
    """The clock in seconds after a few more steps: of this thread's work, or of the wall where an accelerator works.

    What else a processor does meanwhile is not counted, or runs of a busy moment would get fewer steps than others.
    """
    import torch

    for _ in islice(steps, _BETWEEN_LOOKS):
        pass
    if default_device().type == "cpu":
        return time.thread_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def _forget_peak_memory() -> None:
    """Starts the process's peak anew, so that a run's is not that of the runs before; elsewhere than Linux it is."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
