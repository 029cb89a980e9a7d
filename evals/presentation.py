"""The metrics of one or several evaluations as people read them: tables, each above its controls."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from mnif.utils.errors import UserError, markdown_code, printable
from mnif.utils.json_files import read_object

_LAST = 99


@dataclass(frozen=True)
class Family:
    """What tables know of the metrics whose names begin alike.

    Attributes:
        arrow: towards better; "" where neither way is.
        rank: place in a table; metrics of one rank keep the order of their file.
        label: for the metric that has no more to its name, in place of its key; ``{split}`` stands for the split.
    """

    arrow: str
    rank: int = _LAST
    label: str = ""


FAMILIES = {
    "fid": Family("↓", 0),
    "fd": Family("↓", 1),
    "kid": Family("↓", 2),
    "kd": Family("↓", 3),
    "precision": Family("↑", 4),
    "recall": Family("↑", 5),
    "density": Family("↑", 6),
    "coverage": Family("↑", 7),
    "nn_ratio": Family("", 8, "nn_ratio, 1 is as new as unseen data"),
    "nn_ratio_latents": Family("", 8, "nn_ratio in latents"),
    "copied_share": Family("", 9),
    "copied_share_latents": Family("", 9, "copied share in latents, 0.05 is none"),
    "psnr": Family("↑", 10, "PSNR, {split}, dB"),
    "ssim": Family("↑", 11, "SSIM, {split}"),
    "iou": Family("↑"),
    "accuracy": Family("↑"),
    "chamfer": Family("↓"),
    "rfid": Family("↓"),
    "rfd": Family("↓"),
    "mmd": Family("↓"),
    "cov": Family("↑"),
    "border_step_ratio": Family("", label="step across cell borders, {split}, share of the originals'"),
}
"""By the first words of a metric's name; a name that is not here is shown as it is, after the others."""

CONTROLS_OF_SAMPLES = {
    "gaussian": "Gaussian latents",
    "pca": "Gaussian over PCA",
    "floor": "real against real",
    "copies": "copies of training instances",
}

CONTROLS_OF_RECONSTRUCTIONS = {
    "encoder": "encoder alone",
    "inner_loop": "inner loop alone",
    "pca": "PCA, as many numbers",
    "mean": "mean of the training set",
    "floor": "real against real",
}

_SPLITS = {"train": "training", "heldout": "held-out", "test": "test"}


def _any(words: Iterable[str]) -> str:
    return f"({'|'.join(words)})"


_SAMPLES_KEY = re.compile(f"(.+?)(?:_{_any(CONTROLS_OF_SAMPLES)})?")

_RECONSTRUCTIONS_KEY = re.compile(
    f"(.+?)(?:_{_any(CONTROLS_OF_RECONSTRUCTIONS)})?_{_any(_SPLITS)}(?:_{_any(CONTROLS_OF_RECONSTRUCTIONS)})?"
)
"""The control stands before the split or after it."""

_ELSEWHERE = ("seconds", "peak_rss_mb", "images_per_second")  # not quality


@dataclass(frozen=True)
class Metric:
    """One number of an evaluation, with what its key in ``metrics.json`` says of it.

    Attributes:
        key: all of it.
        name: what is measured, such as "psnr" or "fd_lite0".
        split: of reconstructions "train", "heldout" or "test"; "" of samples.
        subject: the control that was measured; "" for the samples or reconstructions themselves.
        value: the number.
        std: its standard error, where it is known.
    """

    key: str
    name: str
    split: str
    subject: str
    value: float
    std: float | None

    @property
    def identity(self) -> tuple[str, str, str]:
        """What is the same in all evaluations that have this metric."""
        return self.name, self.split, self.subject

    @property
    def family(self) -> Family:
        """That of the most words the name begins with."""
        words = self.name.split("_")
        heads = ("_".join(words[:count]) for count in range(len(words), 0, -1))
        return next((FAMILIES[head] for head in heads if head in FAMILIES), Family(""))

    @property
    def label(self) -> str:
        """As in a table, with an arrow towards better."""
        exact = FAMILIES[self.name].label if self.name in FAMILIES and not self.subject else ""
        label = exact.format(split=_SPLITS.get(self.split)) if exact else self.key
        return f"{label} {self.family.arrow}".rstrip()

    @property
    def is_detail(self) -> bool:
        """Whether tables leave it out."""
        return (
            self.split == "test"
            or self.key.endswith("_subset_mean")
            or (self.name, self.split) == ("border_step_ratio", "train")
            or self.key in _ELSEWHERE
        )

    def controls(self) -> dict[str, str]:
        """The subjects it may be compared with, each with its label, in the order of a table."""
        return CONTROLS_OF_RECONSTRUCTIONS if self.split else CONTROLS_OF_SAMPLES

    def __str__(self) -> str:
        return f"{self.value:.4g}" + (f" ± {self.std:.1g}" if self.std is not None else "")


class EvaluationFile(msgspec.Struct):
    """What an evaluation's ``metrics.json`` holds beside its metrics."""

    inputs: dict[str, Any] = {}
    protocol: dict[str, bool | int | float | str | None] = {}
    warnings: list[str] = []
    model: dict[str, bool | int | float | str | None] = {}
    command: str = ""


def read_evaluation(path: Path) -> dict[str, Any]:
    """Reads an evaluation's ``metrics.json``.

    Raises:
        UserError: the file is missing or damaged, or a metric is no number.
    """
    evaluation = read_object(path, EvaluationFile)
    check_metrics(evaluation, str(path))
    return evaluation


def check_metrics(evaluation: Mapping[str, Any], where: str) -> None:
    """Raises a UserError that begins with ``where`` unless all metrics of an evaluation are numbers, or missing."""
    for key, value in evaluation.items():
        is_metric = key.endswith("_std") or key.split("_")[0] in {name.split("_")[0] for name in FAMILIES}
        if is_metric and not isinstance(value, int | float | None):
            raise UserError(f"{where}: {key} is no number")


def metrics_of(evaluation: Mapping[str, Any]) -> Iterator[Metric]:
    """Reads every metric of an evaluation, the content of a ``metrics.json``, in its order."""
    for key, value in evaluation.items():
        if not isinstance(value, float) or key.endswith("_std"):
            continue
        std = evaluation.get(f"{key}_std")
        if match := _RECONSTRUCTIONS_KEY.fullmatch(key):
            name, before, split, after = match.groups()
            yield Metric(key, name, split, before or after or "", value, std)
        elif match := _SAMPLES_KEY.fullmatch(key):
            name, control = match.groups()
            yield Metric(key, name, "", control or "", value, std)


@dataclass(frozen=True)
class TableRow:
    """One metric of every evaluation.

    Attributes:
        label: with an arrow towards better.
        cells: one for each evaluation, "–" where it is unknown.
        control: whether it is a control of the metric above.
    """

    label: str
    cells: list[str]
    control: bool = False


def table_rows(evaluations: Sequence[Mapping[str, Any]]) -> list[TableRow]:
    """Makes the rows of a table of evaluations, each the content of a ``metrics.json``."""
    columns = [{metric.identity: metric for metric in metrics_of(evaluation)} for evaluation in evaluations]
    metrics = {identity: metric for column in columns for identity, metric in column.items()}
    rows = []
    for metric in sorted(metrics.values(), key=lambda metric: metric.family.rank):
        is_control = metric.subject and (metric.name, metric.split, "") in metrics
        if is_control or metric.is_detail:
            continue
        rows.append(TableRow(metric.label, [str(column.get(metric.identity, "–")) for column in columns]))
        for subject, label in metric.controls().items():
            control = (metric.name, metric.split, subject)
            if control in metrics and not metric.subject:
                rows.append(TableRow(label, [str(column.get(control, "–")) for column in columns], control=True))
    return rows


def markdown_table(head: Sequence[str], rows: Sequence[TableRow]) -> str:
    """Writes the table in Markdown; controls are in italics."""
    names = [printable(name).replace("|", "\\|") for name in head]
    lines = ["| " + " | ".join(names) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        label = f"*– {row.label}*" if row.control else row.label
        lines.append("| " + " | ".join([label, *row.cells]) + " |")
    return "\n".join(lines) + "\n"


def protocol_line(protocol: Mapping[str, Any]) -> str:
    """Says in a sentence what the numbers were measured under."""
    parts = [printable(f"{name.replace('_', ' ')} {value}") for name, value in protocol.items()]
    return "Protocol: " + ", ".join(parts) + "."


def evaluation_markdown(metrics: Mapping[str, Any], name: str) -> str:
    """Writes one evaluation: its table, protocol, warnings and command."""
    parts = [markdown_table(["figure", name], table_rows([metrics]))]
    parts += [f"**{warning}**\n" for warning in metrics.get("warnings", [])]
    if "protocol" in metrics:
        parts.append(protocol_line(metrics["protocol"]) + "\n")
    parts.append(f"{markdown_code(metrics['command'])}\n")
    return "\n".join(parts)


HEADLINES = (
    "fid",
    "fd_lite0",
    "precision_lite0",
    "recall_lite0",
    "mmd_chamfer",
    "nn_ratio_latents",
    "psnr_heldout",
    "ssim_heldout",
    "iou_heldout",
)
"""The few metrics that say most of a model, by their keys."""

_HEADLINE_CONTROLS = ("gaussian", "pca", "floor")


def headlines_markdown(metrics: Mapping[str, Any], name: str) -> str:
    """Writes the few figures of an evaluation that say most, each in a row with its controls."""
    known = {metric.identity: metric for metric in metrics_of(metrics)}
    chosen = [metric for key in HEADLINES for metric in known.values() if metric.key == key]
    lines = [f"| figure | {printable(name)} | beside it |", "|---|---:|---|"]
    for metric in chosen:
        beside = [
            f"{label} {known[metric.name, metric.split, subject]}"
            for subject, label in metric.controls().items()
            if subject in _HEADLINE_CONTROLS and (metric.name, metric.split, subject) in known
        ]
        lines.append(f"| {metric.label} | {metric} | {', '.join(beside)} |")
    return "\n".join(lines) + "\n"
