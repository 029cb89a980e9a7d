"""Whether drawn avatars are combinations of parts that occur in training, and how sure their parts are.

    python benchmarks/combinations.py --model runs/avatars/model --latents runs/avatars/latents.safetensors

The parts of a real avatar are known from its seed. For each kind of part a linear discriminant on 256 principal
components of the pixels, with a shrunk covariance, is learned from the training pictures; how often it names held-out
pictures' parts rightly says whether parts can be told at all. Then samples' parts are named. A part is *unsure* where
the likeliest has a probability below that which one in a hundred of the held-out pictures' parts stays under.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from dicebear import Avatar, Style
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from evals.loaded_run import splits_of
from latent_prior.pipeline import load_pipeline
from latent_prior.sampling import sample_latents
from mnif.data.builtin import avatar_style
from mnif.data.dataset import Split
from mnif.data.images import load_images
from mnif.latents.table import LatentTable
from mnif.models.mnif_model import MNIFModel
from mnif.utils.pixels import to_uint8

KINDS = ("head", "expression", "facialHair", "accessories", "mask", "skinColor", "clothingColor")
_SHAPES = 5  # the first kinds, which are no colours
_COMPONENTS, _UNSURE = 256, 0.01


@dataclass
class Arguments:
    """Name the parts of samples, of held-out reconstructions, and of real pictures."""

    model: Path
    """A model folder of avatars at any resolution, with a prior."""
    latents: Path
    """The table of its run."""
    data: str = "avatars"
    """What it was trained on."""
    num_samples: int = 1000
    """Of seed 0."""
    steps: tuple[int, ...] = (8,)
    """Of the prior."""
    student_steps: tuple[int, ...] = ()
    """Of its student."""


def main(arguments: Arguments) -> None:
    pipeline = load_pipeline(arguments.model)
    pipeline.set_progress_bar_config(disable=True)
    size = pipeline.decoder.config.resolution
    data = load_images(arguments.data, size)
    table = LatentTable.load_for(pipeline.decoder, arguments.latents)
    splits = splits_of(table, data)
    parts = parts_of(arguments.data, data.ids)
    train, held_out = splits == Split.TRAIN, splits == Split.HELD_OUT
    judge = PartJudge(data.images[train], parts[train])
    real = judge.named(np.asarray(data.images[held_out]))
    for kind, right in zip(KINDS, (real.parts == parts[held_out]).mean(axis=0), strict=True):
        print(f"{kind}: {right:.1%} of held-out pictures named rightly")
    judge.sure = np.quantile(real.certainty, _UNSURE, axis=0)
    print(f"true combinations of held-out pictures that occur in training: {judge.known(parts[held_out]).mean():.1%}")
    print(f"| pictures | number | occur in training | without colours | a part unsure | {' | '.join(KINDS)} |")
    print("|" + "---|" * (len(KINDS) + 5))
    show("held out", judge, real)
    show("their reconstructions", judge, judge.named(drawn(pipeline.decoder, table.latents[table.held_out])))
    for count in arguments.steps:
        latents = sample_latents(pipeline, 0, range(arguments.num_samples), count, use_student=False)
        show(f"samples, {count} steps", judge, judge.named(drawn(pipeline.decoder, latents)))
    for count in arguments.student_steps:
        latents = sample_latents(pipeline, 0, range(arguments.num_samples), count, use_student=True)
        show(f"samples of the student, {count} steps", judge, judge.named(drawn(pipeline.decoder, latents)))


def parts_of(source: str, ids: Sequence[str]) -> np.ndarray:
    """The parts of avatars by their names, which end with the seed: [N, K]."""
    style, rows = Style(avatar_style(source)), []
    for name in ids:
        options = Avatar(style, {"seed": str(int(name.rpartition("-")[2]))}).to_json()["options"]
        chosen = [options.get(f"{kind}Variant", options.get(kind, "none")) for kind in KINDS]
        rows.append([part[0] if isinstance(part, list) else part for part in chosen])
    return np.array(rows)


@dataclass
class Named:
    """The likeliest part of each kind [N, K], and its probability [N, K]."""

    parts: np.ndarray
    certainty: np.ndarray


class PartJudge:
    """Names the parts of pictures [N, H, W, 3] uint8."""

    def __init__(self, pictures: np.ndarray, parts: np.ndarray):
        self.components = PCA(_COMPONENTS, svd_solver="randomized", random_state=0)
        inputs = self.components.fit_transform(_flat(pictures))
        make = LinearDiscriminantAnalysis
        self.judges = [make(solver="lsqr", shrinkage=0.01).fit(inputs, column) for column in parts.T]
        self.combinations = {tuple(row) for row in parts}
        self.looks = {tuple(row[:_SHAPES]) for row in parts}
        self.sure = np.zeros(len(KINDS))

    def named(self, pictures: np.ndarray) -> Named:
        inputs = self.components.transform(_flat(pictures))
        shares = [judge.predict_proba(inputs) for judge in self.judges]
        names = [judge.classes_[share.argmax(axis=1)] for judge, share in zip(self.judges, shares, strict=True)]
        return Named(np.stack(names, axis=1), np.stack([share.max(axis=1) for share in shares], axis=1))

    def known(self, parts: np.ndarray, colours: bool = True) -> np.ndarray:
        kinds, among = (len(KINDS), self.combinations) if colours else (_SHAPES, self.looks)
        return np.array([tuple(row[:kinds]) in among for row in parts])


def show(name: str, judge: PartJudge, named: Named) -> None:
    unsure = named.certainty < judge.sure
    shares = [
        *(judge.known(named.parts, colours).mean() for colours in (True, False)),
        unsure.any(axis=1).mean(),
    ]
    cells = [f"{share:.1%}" for share in (*shares, *unsure.mean(axis=0))]
    print(f"| {name} | {len(named.parts)} | {' | '.join(cells)} |", flush=True)


def _flat(pictures: np.ndarray) -> np.ndarray:
    return np.asarray(pictures, dtype=np.float32).reshape(len(pictures), -1) / 255


@torch.no_grad()
def drawn(decoder: MNIFModel, latents: Tensor) -> np.ndarray:
    return np.concatenate([to_uint8(decoder(some)) for some in latents.split(64)])


if __name__ == "__main__":
    main(tyro.cli(Arguments, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True))
