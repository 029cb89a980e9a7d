"""`mnif monitor`: tells whether data are still of the kind that a model knows, by its reference profile."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mnif.utils.args import parse_arguments
from mnif.utils.devices import DeviceFlags, chosen_device
from mnif.utils.errors import UserError, check_at_least, printable
from mnif.utils.files import write_json, written_atomically
from mnif.utils.model_folders import is_trained_model, model_folder_in
from mnif.utils.output_folders import check_output_folder, output_folder_of
from mnif.utils.pixels import MAX_IMAGE_PIXELS, limit_image_pixels
from mnif.utils.process import command_line

if TYPE_CHECKING:
    from torch import Tensor

    from evals.drift import Test
    from mnif.data.batches import ArrayDataset
    from mnif.data.dataset import Dataset
    from mnif.latents.inference import LatentInit
    from mnif.latents.profile import Profile, Scored
    from mnif.models.mnif_model import MNIFModel
    from mnif.signals.base import Signal

_SEARCHED = 128  # instances whose latents are searched for, to see what the bases can draw
_SHOWN_TESTS = 30  # of the tests, in monitor.json and on the page


@dataclass(kw_only=True)
class DataFlags:
    """Which instances."""

    split: Literal["all", "train", "held_out", "test"] = "all"
    """Which part of the data, cut as `mnif fit` does it; --fit takes the held-out part."""
    held_out_fraction: float = 0.1
    """As in `mnif fit`."""
    test_fraction: float = 0.05
    """As in `mnif fit`."""
    max_image_pixels: int = MAX_IMAGE_PIXELS
    """Pixels that a picture file may have."""


@dataclass(kw_only=True)
class TestsFlags:
    """How strict it is."""

    false_alarm_rate: float | None = None
    """Share of instances like the held-out ones that may be called doubtful or out; default: the profile's, 0.05."""
    significance: float = 0.01
    """Level of all tests together: how often data like the held-out ones are not kept."""
    refinement_steps: int = 60
    """Adam steps by which latents are searched for, as in `mnif fit`."""


@dataclass(kw_only=True)
class MonitorArguments(DataFlags, TestsFlags, DeviceFlags):
    """Test data against the model's profile, and advise: keep (exit code 0), refine, grow or refit (exit code 1)."""

    model: Path
    """The model folder, RUN/model."""
    data: str
    """A built-in set, a folder or a file of what the model was trained on."""
    output_dir: Path | None = None
    """Gets monitor.json and monitor.html; needed without --fit."""
    fit: bool = False
    """Make the profile of the model from the held-out part of the data, for models from before there were any."""


def main(arguments: list[str]) -> int:
    """Runs `mnif monitor`."""
    return monitor(parse_arguments(MonitorArguments, arguments, "mnif monitor"))


def monitor(arguments: MonitorArguments) -> int:
    """Makes the profile, or tests data against it.

    Returns:
        0 where the advice is to keep the model, and after ``--fit``; 1 where it is not.

    Raises:
        UserError: the model, its profile or the data cannot be read, or a flag is out of range.
    """
    from mnif.latents.inference import load_latent_init
    from mnif.models.io import load_component
    from mnif.models.mnif_model import MNIFModel
    from mnif.signals.registry import signal_of_model

    _check(arguments)
    decoder = load_component(MNIFModel, arguments.model, "decoder").to(chosen_device(arguments.device))
    signal = signal_of_model(decoder)
    latent_init = load_latent_init(arguments.model, decoder, signal)
    latent_init = None if latent_init is None else latent_init.to(decoder.device)
    if arguments.fit:
        _fit(arguments, decoder, signal, latent_init)
        return 0
    return _monitor(arguments, decoder, signal, latent_init)


def _check(arguments: MonitorArguments) -> None:
    check_at_least(0, refinement_steps=arguments.refinement_steps)
    check_at_least(1, max_image_pixels=arguments.max_image_pixels)
    limit_image_pixels(arguments.max_image_pixels)
    for flag in ("false_alarm_rate", "significance"):
        value = getattr(arguments, flag)
        if value is not None and not 0 < value < 1:
            raise UserError(f"--{flag} {value:g}: must lie between 0 and 1")
    if arguments.fit and arguments.split not in ("all", "held_out"):
        raise UserError(f"--split {arguments.split}: a profile is of held-out instances; leave it out")
    if arguments.fit == (arguments.output_dir is not None):
        given = (
            "--fit writes into the model; leave out --output_dir" if arguments.fit else "give --output_dir, or --fit"
        )
        raise UserError(given)
    if arguments.fit and is_trained_model(model_folder_in(arguments.model)):
        raise UserError(f"--fit: {arguments.model} came with mnif and stays as it is; copy the folder")
    if arguments.output_dir is not None:
        check_output_folder(arguments.output_dir, "monitor")


def _selected(arguments: MonitorArguments, signal: Signal, split: str) -> Dataset:
    from mnif.data.dataset import Split

    data = signal.load_like(arguments.data)
    if split == "all":
        return data
    splits = data.split(arguments.held_out_fraction, arguments.test_fraction)
    data = data.rows(splits == Split[split.upper()])
    if not len(data):
        raise UserError(f"--split {split}: no {signal.noun} of {arguments.data} is in it")
    return data


def _fit(arguments: MonitorArguments, decoder: MNIFModel, signal: Signal, latent_init: LatentInit) -> None:
    """Makes the profile as `mnif fit` does at its end."""
    import torch

    from mnif.data.batches import array_dataset
    from mnif.latents.calibration import TrainingInstances, check_enough, fit_profile
    from mnif.latents.inference import infer_latents
    from mnif.latents.profile import FALSE_ALARM_RATE
    from mnif.utils.model_folders import PROFILE

    data = _selected(arguments, signal, "held_out")
    rate, steps = arguments.false_alarm_rate or FALSE_ALARM_RATE, arguments.refinement_steps
    check_enough(len(data), rate)
    if latent_init is None and not steps:
        raise UserError("--refinement_steps 0: this model finds latents by a search alone; give more")
    rows = array_dataset(data.arrays())

    def found(steps: int) -> Tensor:
        return torch.cat([*infer_latents(decoder, signal, rows, latent_init, steps, progress=steps > 0)])

    search: dict[str, Any] = {}
    latents = found(steps if latent_init is None else 0)
    if latent_init is None:
        search = {"refinement_steps": steps}
    elif steps:
        search = {"refined": (found(steps), steps)}
    learned = _selected(arguments, signal, "train")
    trained = TrainingInstances(array_dataset(learned.arrays()), learned.groups)
    profile = fit_profile(decoder, signal, trained, rows, data.groups, latents, data.name, rate, **search)
    profile.save(arguments.model)
    folder = model_folder_in(arguments.model) / PROFILE
    print(f"{folder}: a profile of {len(data)} held-out {signal.noun}s, for verdicts at {rate:.1%} of false alarms")


def _monitor(arguments: MonitorArguments, decoder: MNIFModel, signal: Signal, latent_init: LatentInit) -> int:
    from evals.drift import ADVICE, LEAST_INSTANCES, advice, compare, undrawable_share
    from mnif.data.batches import array_dataset
    from mnif.latents.gate import judge, summary
    from mnif.latents.profile import load_profile, score_rows

    assert arguments.output_dir is not None
    profile = load_profile(arguments.model, decoder)
    rate = profile.rate(arguments.false_alarm_rate)
    data = _selected(arguments, signal, arguments.split)
    if len(data) < LEAST_INSTANCES:
        raise UserError(f"--data {arguments.data}: {len(data)} {signal.noun}s; {LEAST_INSTANCES} are needed at least")
    rows = array_dataset(data.arrays())
    with output_folder_of(arguments.output_dir, "monitor"):
        latents, scored = score_rows(profile, decoder, signal, rows, latent_init)
        tests = compare(profile, decoder, scored, latents, data.groups, rate)
        significant = tests[0].adjusted <= arguments.significance
        searched = _searched_residuals(arguments, profile, decoder, signal, rows, latent_init) if significant else None
        undrawable = 0.0 if searched is None else undrawable_share(profile, searched, rate)
        chosen = advice(significant, undrawable, rate)
        judged = judge(profile, scored, data.ids, rate)
        result = _result(arguments, profile, data, tests, judged, chosen, undrawable if significant else None)
        page = _page(arguments, profile, decoder, signal, rows, latents, scored, tests, result)
        with written_atomically(arguments.output_dir / "monitor.html") as temporary:
            temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
        write_json(arguments.output_dir / "monitor.json", result)
    print(summary(judged))
    print(f"{arguments.output_dir}: {chosen}: {ADVICE[chosen]}")
    return 0 if chosen == "keep" else 1


def _searched_residuals(
    arguments: MonitorArguments,
    profile: Profile,
    decoder: MNIFModel,
    signal: Signal,
    rows: ArrayDataset,
    latent_init: LatentInit,
) -> np.ndarray:
    """Residual scores of some instances with latents that are searched for: what the bases can draw at best."""
    import torch

    from mnif.data.batches import evenly_spaced
    from mnif.latents.inference import infer_latents
    from mnif.latents.patches import patch_residuals
    from mnif.latents.surprise import residual_score

    some = rows.subset(evenly_spaced(len(rows), _SEARCHED))
    steps = max(arguments.refinement_steps, profile.record.refinement_steps)
    latents = torch.cat([*infer_latents(decoder, signal, some, latent_init, steps, progress=True)])
    return residual_score(patch_residuals(decoder, signal, some, latents, profile.record.patches))


def _result(
    arguments: MonitorArguments,
    profile: Profile,
    data: Dataset,
    tests: list[Test],
    judged: dict[str, Any],
    chosen: str,
    undrawable: float | None,
) -> dict[str, Any]:
    """What monitor.json holds."""
    from evals.drift import ADVICE, counts_of

    return {
        "advice": chosen,
        "why": ADVICE[chosen],
        "data": data.name,
        "instances": len(data),
        "profile": {"data": profile.record.data, "instances": profile.record.instances},
        "significance": arguments.significance,
        "tests": counts_of(tests, arguments.significance),
        "smallest": [
            {"family": test.family, "of": test.subject, "p_value": test.p_value, "adjusted": test.adjusted}
            for test in tests[:_SHOWN_TESTS]
        ],
        "undrawable": undrawable,
        "gate": judged,
        "command": command_line(),
    }


def _page(
    arguments: MonitorArguments,
    profile: Profile,
    decoder: MNIFModel,
    signal: Signal,
    rows: ArrayDataset,
    latents: Tensor,
    scored: Scored,
    tests: list[Test],
    result: dict[str, Any],
) -> str:
    """Draws the page: what to do, histograms of the profile's scores and of these, and the worst instances."""
    from evals.charts import histogram_chart
    from evals.drift import FAMILIES
    from evals.report.monitor import worst_instances
    from evals.report.provenance import provenance
    from evals.report.templates import as_svgs, rendered
    from mnif.latents.surprise import REASONS, SCORES

    ids = list(result["gate"]["instances"])
    charts = {
        name: histogram_chart(known, now, name)
        for name, known, now in zip(SCORES, profile.arrays["reference_scores"].T, scored.scores.T, strict=True)
    }
    return rendered(
        "monitor.html.jinja",
        title=printable(Path(arguments.data).name),
        model=printable(arguments.model),
        result=result,
        families=FAMILIES,
        meanings=SCORES,
        reasons=REASONS,
        charts=as_svgs(charts),
        noun=signal.noun,
        tests=tests[:_SHOWN_TESTS],
        worst=worst_instances(profile, decoder, signal, rows, latents, scored, ids, result["gate"]),
        provenance=provenance(),
    )
