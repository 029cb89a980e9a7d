"""`mnif fit`: learns the bases and one latent per instance (stage one)."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from mnif.data.dataset import Dataset, Split
from mnif.training.assembly import (
    augmentations,
    cells_and_tokens,
    check_loss,
    dry_run_report,
    learn,
    make_decoder,
    make_method,
)
from mnif.training.fit_arguments import FitArguments, with_preset
from mnif.training.run_record import begin_stage, finish_stage
from mnif.utils.args import parse_given
from mnif.utils.errors import UserError
from mnif.utils.json_files import merge_json
from mnif.utils.output_folders import holds_folder
from mnif.utils.pixels import limit_image_pixels

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator

    from mnif.signals.base import Signal


def parse_fit_arguments(arguments: list[str]) -> FitArguments:
    """Reads the flags over the defaults of a preset.

    Raises:
        UserError: a flag, the preset, or what the data are cannot be understood.
    """
    return with_preset(FitArguments, parse_given(FitArguments, arguments, "mnif fit"))


def main(arguments: list[str]) -> None:
    """Runs `mnif fit`."""
    fit(parse_fit_arguments(arguments))


@holds_folder("output_dir", "fit")
def fit(arguments: FitArguments) -> None:
    """Trains stage one into ``arguments.output_dir``.

    Raises:
        UserError: the data cannot be read, the folder is another command's or holds another run, or training diverges.
    """
    _fit(arguments, profile=True)


@holds_folder("output_dir", "fit")
def fit_bare(arguments: FitArguments) -> None:
    """Trains as :func:`fit` does; the model gets no reference profile, which takes a minute."""
    _fit(arguments, profile=False)


def _fit(arguments: FitArguments, profile: bool) -> None:
    from accelerate.utils import set_seed

    from mnif.signals.registry import signal_class
    from mnif.training.loader import fill_in_steps
    from mnif.training.loop import check_machine, make_accelerator

    started = time.perf_counter()
    check_machine(arguments)
    limit_image_pixels(arguments.max_image_pixels)
    kind = signal_class(arguments.signal)
    data = kind.load(arguments.data, asdict(arguments))
    signal = kind.from_data(data, asdict(arguments))
    splits = data.split(arguments.held_out_fraction, arguments.test_fraction)
    instances = int((splits == Split.TRAIN).sum())
    if not instances:
        raise UserError(f"--data {arguments.data}: no {signal.noun} is left to train on; lower --held_out_fraction")
    fill_in_steps(arguments, instances)
    augmentations(arguments, signal)
    check_loss(arguments, signal)
    arguments.cells, arguments.tokens = cells_and_tokens(arguments, signal)
    if arguments.dry_run:
        print("\n".join(dry_run_report(arguments, make_decoder(arguments, signal), signal, instances)))
        return
    run = arguments.output_dir
    accelerator = make_accelerator(arguments, run)
    if begin_stage(run, "fit", arguments, {"data_fingerprint": data.fingerprint()}):
        print(f"{run}: `mnif fit` has finished here before with these arguments; nothing to do")
        return
    set_seed(arguments.seed)
    metrics = _train(arguments, accelerator, signal, data, splits, profile)
    if accelerator.is_main_process:
        merge_json(run / "metrics.json", metrics | {"seconds": round(time.perf_counter() - started, 1)})
        finish_stage(run, "fit")


def _train(
    arguments: FitArguments,
    accelerator: Accelerator,
    signal: Signal,
    data: Dataset,
    splits: np.ndarray,
    profile: bool,
) -> dict[str, float]:
    """Learns from the data and saves what was learned; the main process gets figures of it."""
    decoder = make_decoder(arguments, signal)
    method = make_method(arguments, decoder, signal, int((splits == Split.TRAIN).sum()), accelerator)
    return learn(arguments, accelerator, method.to(accelerator.device), data, splits, profile=profile)
