"""How long a step of learning takes on this machine, measured on steps that are thrown away."""

import contextlib
import io
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from mnif.data import Instances
from mnif.fit_arguments import FitArguments
from mnif.fitting import AutoDecoding
from mnif.rows import rows_of
from mnif.signals import Signal
from mnif.train import make_decoder, make_fitting, make_optimizers
from mnif.training import make_accelerator, train

_BETWEEN_LOOKS = 5  # steps between two looks at the clock; the first ones are the warm-up
_NEVER = 1_000_000_000  # steps


def seconds_per_step(arguments: FitArguments, signal: Signal, train_data: Instances, seconds: float) -> float:
    """Wall seconds of one optimizer step, loading included; validation and checkpoints are not.

    The real training loop runs in a temporary folder until the clock has been looked at often enough.

    Args:
        arguments: of the run that is planned.
        signal: what the data are.
        train_data: the instances to learn from.
        seconds: how long to measure, after the warm-up; at least five steps are measured.

    Raises:
        UserError: training diverges within these steps.
    """
    with tempfile.TemporaryDirectory() as folder:
        short = replace(
            arguments,
            output_dir=Path(folder),
            max_train_steps=_NEVER,
            checkpointing_steps=_NEVER,
            validation_steps=_BETWEEN_LOOKS,
            resume_from_checkpoint="latest",
            report_to=None,
        )
        accelerator = make_accelerator(short, short.output_dir)
        decoder = make_decoder(short, signal)
        fitting = make_fitting(short, decoder, signal, len(train_data), accelerator).to(accelerator.device)
        rows, optimizers = rows_of(train_data.arrays()), make_optimizers(short, fitting)
        latent_rows = fitting.rows if isinstance(fitting, AutoDecoding) else None
        watch = _Watch(seconds)
        silence = io.StringIO()  # the loop would show a bar without an end
        with (
            contextlib.suppress(_Enough),
            contextlib.redirect_stdout(silence),
            contextlib.redirect_stderr(silence),
        ):
            train(
                accelerator,
                short,
                fitting,
                optimizers,
                rows,
                short.output_dir,
                "fit",
                watch.look,
                latent_rows=latent_rows,
            )
    return watch.seconds_per_step


class _Enough(Exception):  # noqa: N818  # nothing has gone wrong: it is the way out of the loop
    pass


class _Watch:
    """Stands in for a validation: looks at the clock, and ends the training when it has run for long enough."""

    def __init__(self, seconds: float):
        self.seconds, self.steps, self.started = seconds, 0, 0.0
        self.seconds_per_step = 0.0

    def look(self) -> dict[str, float]:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        now = time.perf_counter()
        if not self.started:
            self.started = now
            return {}
        self.steps += _BETWEEN_LOOKS
        self.seconds_per_step = (now - self.started) / self.steps
        if now - self.started >= self.seconds:
            raise _Enough
        return {}
