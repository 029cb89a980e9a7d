"""How well a model's profile tells spoilt and foreign instances from held-out ones, and what a robust search gains.

    python benchmarks/monitoring.py --model runs/emoji/model --data twemoji --other avatars --output monitoring.json

Instances are those of the test split, one of each group, which no threshold, mean or covariance has seen. Of each
kind of damage the AUROC of the alarm (the chance that a spoilt instance has a higher one than a sound one) with its
standard error (Hanley and McNeil, 1982), the share called doubtful or out at the profile's false-alarm rate, and the
reason given most often.

- noise: Gaussian, standard deviation 0.1 on values in [-1, 1].
- blur: Gaussian, standard deviation 1/32 of an axis; light blur: half of it.
- occluded: a square (cube) of a quarter of the picture's area (volume), anywhere, of one random colour; shapes: empty.
- shifted: by 2 pixels along the last axis, what leaves at one side enters at the other; by 1 pixel likewise;
  or by 2, and what enters repeats the border.
- specks: one pixel of fifty is white (full); turned: two axes exchanged; faint: values halved. Profiles learn nothing
  of these.
- other: instances of another data set, at most 400.
- rubbish (of the robust search): a quarter of the pixels, anywhere, each of a random colour (occupancy).

``divided`` has means of the same over 40 divisions of held-out instances (with ``--split test``: and those of the
test) in two thirds that make residuals', latents' and thresholds' part of a profile anew, and a third that is judged.
Choices were made by ``--split held_out``, which looks at no test instance.
``denoising``, where the model has a prior of clean latents: AUROC of its mean log squared error at five noise levels,
which is no score of profiles.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import rankdata
from torch import Tensor

from latent_prior import MNIFPipeline
from mnif.data.batches import array_dataset
from mnif.data.dataset import Split
from mnif.latents import surprise
from mnif.latents.calibration import HeldOut, fit_arrays, one_of_each
from mnif.latents.inference import LatentInit, initial_latents, load_latent_init, optimize_latents
from mnif.latents.patches import residuals_in_patches
from mnif.latents.pca import fit_pca
from mnif.latents.profile import Profile, load_profile
from mnif.latents.robust import RobustLoss
from mnif.latents.surprise import SCORES
from mnif.models.io import load_component
from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import GridSignal, psnr
from mnif.signals.registry import signal_of_model
from mnif.utils.files import write_json

_OTHERS = 400
_DIVISIONS = 40
_TIMESTEPS = (50, 150, 300, 500, 700)
_BATCH = 64


def noise(values: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    return values + 0.1 * draw.standard_normal(values.shape, dtype=np.float32)


def blur(values: np.ndarray, draw: np.random.Generator, share: float = 1 / 32) -> np.ndarray:
    widths = [0.0, *(pixels * share for pixels in values.shape[1:-1]), 0.0]
    return gaussian_filter(values, widths, mode="nearest")


def light_blur(values: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    return blur(values, draw, 1 / 64)


def occluded(values: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    spoilt, grid = values.copy(), values.shape[1:-1]
    sides = [round(pixels * 0.25 ** (1 / len(grid))) for pixels in grid]
    for one in spoilt:
        starts = [draw.integers(0, pixels - side + 1) for pixels, side in zip(grid, sides, strict=True)]
        place = tuple(slice(start, start + side) for start, side in zip(starts, sides, strict=True))
        one[place] = draw.uniform(-1, 1, values.shape[-1]) if len(grid) == 2 else -1
    return spoilt


def shifted(values: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    return np.roll(values, 2, axis=-2)


def shifted_by_one(values: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    return np.roll(values, 1, axis=-2)


def shifted_repeating(values: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    return np.take(values, np.maximum(np.arange(values.shape[-2]) - 2, 0), axis=-2)


def specks(values: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    return np.where(draw.random(values.shape[:-1])[..., None] < 0.02, np.float32(1), values)


def turned(values: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    return np.ascontiguousarray(np.swapaxes(values, 1, 2))


def faint(values: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    return values / 2


DAMAGE: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "noise": noise,
    "blur": blur,
    "light blur": light_blur,
    "occluded": occluded,
    "shifted": shifted,
    "shifted by 1": shifted_by_one,
    "shifted, border repeated": shifted_repeating,
    "specks": specks,
    "turned": turned,
    "faint": faint,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--other", required=True)
    parser.add_argument("--split", choices=["test", "held_out"], default="test")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rubbish", type=int, default=64, help="instances of the robust search; 0 leaves it out")
    parser.add_argument("--steps", type=int, default=60, help="of that search")
    arguments = parser.parse_args()
    decoder = load_component(MNIFModel, arguments.model, "decoder")
    signal = signal_of_model(decoder)
    assert isinstance(signal, GridSignal)
    latent_init = load_latent_init(arguments.model, decoder, signal)
    profile = load_profile(arguments.model, decoder)

    def values_of(rows: Any) -> np.ndarray:
        return torch.cat([signal.observe(batch).values for batch in array_dataset(rows.arrays()).batches(256)]).numpy()

    def seen(values: np.ndarray) -> HeldOut:
        return _seen(profile, decoder, signal, latent_init, values)

    data = signal.load_like(arguments.data)
    splits = data.split(0.1, 0.05)
    parts = {split: data.rows(splits == split) for split in (Split.HELD_OUT, Split.TEST)}
    parts = {split: part.rows(one_of_each(part.groups)) for split, part in parts.items()}
    if arguments.split == "held_out":
        parts[Split.TEST] = parts[Split.TEST].rows(np.arange(0))
    values = {split: values_of(part) for split, part in parts.items() if len(part)}
    others = signal.load_like(arguments.other)
    other = seen(values_of(others.rows(np.arange(min(len(others), _OTHERS)))))
    sets = {split: {"sound": seen(some)} for split, some in values.items()}
    for name, spoil in DAMAGE.items():
        for split, some in values.items():
            sets[split][name] = seen(spoil(some, np.random.default_rng(int(split))))
    rate = profile.record.false_alarm_rate
    result: dict[str, Any] = {"data": data.name, "held_out": profile.record.instances}
    if arguments.split == "test":
        judged = {name: _alarms(profile.arrays, some) for name, some in (sets[Split.TEST] | {"other": other}).items()}
        result |= {"test": len(values[Split.TEST]), **_figures(profile, judged, rate)}
    result["divided"] = _divided(profile.arrays, sets, other, rate)
    if (arguments.model / "denoiser").is_dir():
        judged = sets[Split.TEST if arguments.split == "test" else Split.HELD_OUT] | {"other": other}
        errors = {name: _denoising_errors(arguments.model, some.latents) for name, some in judged.items()}
        result["denoising"] = {name: round(auroc(errors["sound"], some), 3) for name, some in errors.items()}
    for name, figures in (result | {"divided": ""}).items():
        print(name, figures)
    for name, figures in result["divided"].items():
        print("divided", name, figures)
    if arguments.rubbish and arguments.split == "test":
        train = values_of(data.rows(splits == Split.TRAIN))
        some = torch.from_numpy(values[Split.TEST][: arguments.rubbish])
        result["rubbish"] = _rubbish(profile, decoder, signal, latent_init, train, some, arguments.steps)
        print(result["rubbish"])
    write_json(arguments.output, result)


@torch.no_grad()
def _seen(
    profile: Profile, decoder: MNIFModel, signal: GridSignal, latent_init: LatentInit, values: np.ndarray
) -> HeldOut:
    """Instances as they are scored."""
    latents, residuals = [], []
    for some in torch.from_numpy(values).split(_BATCH):
        observation = signal.on_grid(some)
        latents.append(initial_latents(decoder, signal, latent_init, observation))
        predictions = signal.predict(decoder, decoder.coefficients(latents[-1]), observation)
        residuals.append(residuals_in_patches(some, predictions, profile.record.patches).double())
    looks = [profile.looks(some) for some in np.array_split(values, -(-len(values) // _BATCH))]
    groups = [str(number) for number in range(len(values))]
    return HeldOut(torch.cat(latents).numpy(), torch.cat(residuals).numpy(), np.concatenate(looks), groups)


def _alarms(arrays: dict[str, np.ndarray], some: HeldOut) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray]:
    """Alarms [N], p-values [N], reasons and scores [N, S] of instances."""
    scores = some.scores(arrays)
    surprises = surprise.surprises_of(arrays, scores)
    alarms = surprise.alarms_of(arrays, surprises)
    reasons = surprise.reasons_of(arrays, surprises, some.looks)
    return alarms, surprise.p_values_of(arrays, alarms), reasons, scores


def _figures(profile: Profile, judged: dict[str, Any], rate: float) -> dict[str, Any]:
    """What one profile makes of sound and spoilt instances."""
    sound = judged["sound"]
    figures: dict[str, Any] = {"false_alarms": float((sound[1] <= rate).mean())}
    for name, (alarms, p_values, reasons, scores) in judged.items():
        if name != "sound":
            area = auroc(sound[0], alarms)
            figures[name] = {
                "auroc": area,
                "error": _error(area, len(sound[0]), len(alarms)),
                "called": float((p_values <= rate).mean()),
                "reason": Counter(reasons).most_common(1)[0][0],
                "single": {score: round(auroc(sound[3][:, n], scores[:, n]), 3) for n, score in enumerate(SCORES)},
            }
    return figures


def _divided(
    looks: dict[str, np.ndarray], sets: dict[Split, dict[str, HeldOut]], other: HeldOut, rate: float
) -> dict[str, Any]:
    """Means, and standard deviations of false alarms, over divisions."""
    joined = {name: _joined([sets[split][name] for split in sets]) for name in next(iter(sets.values()))}
    count = len(joined["sound"].groups)
    found: dict[str, list[list[float]]] = {}
    for seed in range(_DIVISIONS):
        order = np.random.default_rng(seed).permutation(count)
        judging, judged = order[: count * 2 // 3], order[count * 2 // 3 :]
        arrays = fit_arrays(looks, joined["sound"].rows(judging), rate)[0]
        sound = _alarms(arrays, joined["sound"].rows(judged))
        found.setdefault("false_alarms", []).append([float((sound[1] <= rate).mean())])
        for name, some in (joined | {"other": other}).items():
            if name != "sound":
                alarms, p_values, *_ = _alarms(arrays, some if name == "other" else some.rows(judged))
                found.setdefault(name, []).append([auroc(sound[0], alarms), float((p_values <= rate).mean())])
    means = {name: [round(float(mean), 3) for mean in np.mean(rows, axis=0)] for name, rows in found.items()}
    false = np.array(found["false_alarms"])[:, 0]
    return {**means, "instances": count, "false_alarms": [float(false.mean()), float(false.std())]}


def _joined(parts: list[HeldOut]) -> HeldOut:
    arrays = [
        np.concatenate(rows)
        for rows in zip(*[(some.latents, some.residuals, some.looks) for some in parts], strict=True)
    ]
    return HeldOut(*arrays, [str(number) for number in range(len(arrays[0]))])


def _error(area: float, sound: int, spoilt: int) -> float:
    """The standard error of an AUROC by Hanley and McNeil (1982)."""
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (spoilt - 1) * (q1 - area**2) + (sound - 1) * (q2 - area**2)
    return float(np.sqrt(max(variance, 0) / (sound * spoilt)))


@torch.no_grad()
def _denoising_errors(model: Path, latents: np.ndarray) -> np.ndarray:
    """Means over noise levels of the logarithm of what the prior misses of latents [N, D] under one noise, [N]."""
    pipeline = MNIFPipeline.from_pretrained(model)
    denoiser, scheduler = pipeline.denoiser, pipeline.scheduler
    assert scheduler.config["prediction_type"] == "sample"
    clean = denoiser.standardised(torch.from_numpy(latents).float())
    noise = torch.randn(4, 1, latents.shape[1], generator=torch.Generator().manual_seed(0))
    errors = []
    for timestep in _TIMESTEPS:
        share = scheduler.alphas_cumprod[timestep]
        noisy = share.sqrt() * clean + (1 - share).sqrt() * noise
        found = torch.stack([denoiser(each, torch.full((len(each),), timestep)) for each in noisy])
        errors.append((found - clean).square().mean(dim=(0, 2)).log())
    return torch.stack(errors).mean(dim=0).numpy()


def auroc(sound: np.ndarray, spoilt: np.ndarray) -> float:
    """The area under the curve by Mann and Whitney's ranks."""
    ranks = rankdata(np.concatenate([sound, spoilt]))[len(sound) :]
    return float((ranks.sum() - len(spoilt) * (len(spoilt) + 1) / 2) / (len(sound) * len(spoilt)))


def _rubbish(
    profile: Profile,
    decoder: MNIFModel,
    signal: GridSignal,
    latent_init: Any,
    train: np.ndarray,
    clean: Tensor,
    steps: int,
) -> dict[str, float]:
    """PSNR in dB against the clean instances, where a quarter of the pixels of what is observed are rubbish."""
    draw = torch.Generator().manual_seed(0)
    replaced = torch.rand(clean.shape[:-1], generator=draw)[..., None] < 0.25
    random = torch.rand(clean.shape, generator=draw) * 2 - 1
    random = random.sign() if signal.dimensions == 3 else random
    observation = signal.on_grid(torch.where(replaced, random, clean))
    start = initial_latents(decoder, signal, latent_init, observation)
    components = min(decoder.config.latent_dim, len(train) - 1)
    found = {"encoder": start, "plain": optimize_latents(decoder, signal, observation, start, steps)}
    loss = RobustLoss.of(profile, decoder.device)
    found["robust"] = optimize_latents(decoder, signal, observation, start, steps, loss=loss)
    spoilt = {"pca": torch.from_numpy(fit_pca(train, components).reconstruct(observation.values.numpy()))}
    with torch.no_grad():
        spoilt |= {name: decoder(latents) for name, latents in found.items()}
        whole = optimize_latents(decoder, signal, signal.on_grid(clean), start, steps)
        spoilt["clean"] = decoder(whole)
    return {name: psnr(values, clean).mean().item() for name, values in spoilt.items()}


if __name__ == "__main__":
    main()
