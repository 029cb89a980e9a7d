"""How well a model's profile tells spoilt and foreign instances from held-out ones, and what a robust search gains.

    python benchmarks/monitoring.py --model runs/emoji/model --data twemoji --other avatars --output monitoring.json

Instances are those of the test split, one of each group, which no threshold, mean or covariance has seen. Of each kind
of damage the AUROC of the alarm (the chance that a spoilt instance has a higher one than a sound one), the share
called doubtful or out at the profile's false-alarm rate, and the score that was most surprising most often.

- noise: Gaussian, standard deviation 0.1 on values in [-1, 1].
- blur: Gaussian, standard deviation 1/32 of an axis; light blur: half of it.
- occluded: a square (cube) of a quarter of the picture's area (volume), anywhere, of one random colour; shapes: empty.
- shifted: by 2 pixels along the last axis, what leaves at one side enters at the other.
- other: instances of another data set, at most 400.
- rubbish (of the robust search): a quarter of the pixels, anywhere, each of a random colour (occupancy).
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

from mnif.data.batches import array_dataset
from mnif.data.dataset import Split
from mnif.latents import surprise
from mnif.latents.calibration import one_of_each
from mnif.latents.inference import initial_latents, load_latent_init, optimize_latents
from mnif.latents.patches import statistics_of
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


DAMAGE: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "noise": noise,
    "blur": blur,
    "light blur": light_blur,
    "occluded": occluded,
    "shifted": shifted,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--other", required=True)
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

    data = signal.load_like(arguments.data)
    splits = data.split(0.1, 0.05)
    test = data.rows(splits == Split.TEST)
    sound = values_of(test.rows(one_of_each(test.groups)))
    others = signal.load_like(arguments.other)
    sets = {"sound": sound}
    sets |= {name: spoil(sound, np.random.default_rng(0)) for name, spoil in DAMAGE.items()}
    sets["other"] = values_of(others.rows(np.arange(min(len(others), _OTHERS))))
    judged = {name: _judged(profile, decoder, signal, latent_init, values) for name, values in sets.items()}
    rate = profile.record.false_alarm_rate
    result: dict[str, Any] = {
        "data": data.name,
        "held_out": profile.record.instances,
        "test": len(sound),
        "false_alarms": float((judged["sound"][1] <= rate).mean()),
    }
    for name in (*DAMAGE, "other"):
        alarms, p_values, scores, reasons = judged[name]
        result[name] = {
            "auroc": auroc(judged["sound"][0], alarms),
            "called": float((p_values <= rate).mean()),
            "reason": Counter(reasons).most_common(1)[0][0],
            "single": {score: auroc(judged["sound"][2][:, n], scores[:, n]) for n, score in enumerate(SCORES)},
        }
        print(
            f"{name:12} {result[name]['auroc']:.3f} {result[name]['called']:.2f} {result[name]['reason']}", flush=True
        )
    print(f"false alarms {result['false_alarms']:.3f} of {len(sound)}")
    if arguments.rubbish:
        train = values_of(data.rows(splits == Split.TRAIN))
        some = torch.from_numpy(sound[: arguments.rubbish])
        result["rubbish"] = _rubbish(profile, decoder, signal, latent_init, train, some, arguments.steps)
        print(result["rubbish"])
    write_json(arguments.output, result)


@torch.no_grad()
def _judged(profile: Profile, decoder: MNIFModel, signal: GridSignal, latent_init: Any, values: np.ndarray) -> Any:
    """Alarms [N], p-values [N], scores [N, S] and reasons of instances."""
    latents, parts = [], []
    for some in torch.from_numpy(values).split(_BATCH):
        observation = signal.on_grid(some)
        latents.append(initial_latents(decoder, signal, latent_init, observation))
        predictions = signal.predict(decoder, decoder.coefficients(latents[-1]), observation)
        parts.append(statistics_of(some, predictions, profile.record.patches))
    statistics = {name: torch.cat([part[name] for part in parts]).double().numpy() for name in parts[0]}
    scored = profile.score(torch.cat(latents).numpy(), statistics)
    alarms = surprise.alarms_of(profile.arrays, scored.surprises)
    return alarms, scored.p_values, scored.scores, scored.reasons()


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
