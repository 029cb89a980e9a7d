"""What the metrics of a run mean, one card each: good or bad, in plain words, and by which control."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from evals.metrics.neighbours import FEWEST_HELD_OUT, copying_of, copying_verdict, held_out_count

Verdict = Literal["good", "fair", "bad", "open"]


@dataclass(frozen=True)
class Finding:
    """One card.

    Attributes:
        title: the question.
        figure: the answer as a number, with its unit.
        verdict: "open" where nobody can tell, or nothing is to be judged.
        words: the reason, in a sentence or two.
        place: where the figure lies between the controls, from 0 at the better one to 1; None without controls.
        ends: what the controls are called, the better one first.
    """

    title: str
    figure: str
    verdict: Verdict
    words: str
    place: float | None = None
    ends: tuple[str, str] = ("", "")


def findings_of(
    metrics: Mapping[str, Any], distances: Mapping[str, float], latencies: Sequence[Mapping[str, Any]], noun: str
) -> list[Finding]:
    """Lists the cards that the metrics of a run are enough for.

    Args:
        metrics: what `mnif fit` measured, and `mnif eval` on top.
        distances: what `mnif distill` measured (:func:`evals.charts.steps_chart`); may be empty.
        latencies: of :func:`evals.timing.measured_latencies`.
        noun: what an instance is called.
    """
    found = [
        _sample_quality(metrics, noun),
        _variety(metrics, noun),
        _novelty(metrics, noun),
        _reconstruction(metrics, noun),
        _generalisation(metrics, noun),
        _borders(metrics),
        _student(distances),
        _speed(latencies, noun),
    ]
    return [finding for finding in found if finding is not None]


def _sample_quality(metrics: Mapping[str, Any], noun: str) -> Finding | None:
    """The distance of samples from real ones, between that of other real ones and that of Gaussian latents."""
    known = {"fid": "FID", "fd_lite0": "fd_lite0", "fd_resnet": "fd_resnet", "mmd_chamfer": "MMD (chamfer)"}
    for name, label in known.items():
        floor, gaussian = metrics.get(f"{name}_floor"), metrics.get(f"{name}_gaussian")
        if name not in metrics or floor is None or gaussian is None or gaussian <= floor:
            continue
        place = _place(metrics[name], floor, gaussian)
        verdict: Verdict = "good" if place <= 0.1 else "fair" if place <= 0.4 else "bad"
        return Finding(
            f"Do samples look like the {noun}s learned from?",
            f"{label} {_short(metrics[name])}",
            verdict,
            f"Two sets of real {noun}s are {_short(floor)} apart by this measure; latents of a Gaussian, without a "
            f"prior, are {_short(gaussian)} away. Lower is better.",
            place,
            ("real", "no prior"),
        )
    return None


def _variety(metrics: Mapping[str, Any], noun: str) -> Finding | None:
    """How much of the real set samples cover, as a share of what other real ones cover."""
    for name in metrics:
        if not (name.split("_")[0] in ("recall", "cov") and f"{name}_floor" in metrics):
            continue
        floor = metrics[f"{name}_floor"]
        if not floor:
            continue
        share = metrics[name] / floor
        return Finding(
            f"Do samples cover all kinds of {noun}s?",
            f"{100 * metrics[name]:.0f} %",
            "good" if share >= 0.9 else "fair" if share >= 0.6 else "bad",
            f"Share of real {noun}s that have a sample in their neighbourhood ({name.replace('_', ' ')}); as many "
            f"other real ones reach {100 * floor:.0f} %.",
            _place(metrics[name], floor, 0.0),
            ("real", "none"),
        )
    return None


def _novelty(metrics: Mapping[str, Any], noun: str) -> Finding | None:
    copying, verdict = copying_of(metrics), copying_verdict(metrics, noun)
    if copying is None or verdict is None:
        return None
    title = "Are samples new?"
    if copying == "unknown":
        count = held_out_count(metrics)
        words = f"{count} held-out {noun}s are too few to judge by; a verdict needs at least {FEWEST_HELD_OUT}."
        return Finding(title, "no verdict", "open", words)
    ratio = min(metrics[name] for name in ("nn_ratio", "nn_ratio_latents") if name in metrics)
    known: dict[str, Verdict] = {"none": "good", "at times": "fair", "copies": "bad"}
    return Finding(
        title,
        f"nn_ratio {ratio:.2f}",
        known[copying],
        f"This prior {verdict}. 1 is as far from the training {noun}s as unseen ones are.",
    )


def _reconstruction(metrics: Mapping[str, Any], noun: str) -> Finding | None:
    """How well latents of unseen instances give them back, beside a control that takes as many numbers."""
    title = f"Does a latent keep an unseen {noun}?"
    if "iou_heldout" in metrics and "iou_pca_heldout" in metrics:
        lost, of_pca = 1 - metrics["iou_heldout"], 1 - metrics["iou_pca_heldout"]
        verdict: Verdict = "good" if lost <= 0.7 * of_pca else "fair" if lost <= of_pca else "bad"
        figure, reached = f"IoU {metrics['iou_heldout']:.3f}", f"an IoU of {metrics['iou_pca_heldout']:.3f}"
        return Finding(title, figure, verdict, _of_pca(metrics, reached, noun))
    if "psnr_heldout" not in metrics:
        return None
    figure = f"{metrics['psnr_heldout']:.1f} dB"
    if "psnr_pca_heldout" not in metrics:
        return Finding(title, figure, "open", "PSNR. There is no control beside it to judge by.")
    gain = metrics["psnr_heldout"] - metrics["psnr_pca_heldout"]
    verdict = "good" if gain >= 3 else "fair" if gain >= 0 else "bad"
    return Finding(title, figure, verdict, _of_pca(metrics, f"{metrics['psnr_pca_heldout']:.1f} dB", noun))


def _of_pca(metrics: Mapping[str, Any], reached: str, noun: str) -> str:
    words = f"PCA with as many numbers for each {noun} reaches {reached}."
    components, numbers = metrics.get("pca_components"), metrics.get("model", {}).get("latent_dim")
    if isinstance(components, int) and isinstance(numbers, int) and components < numbers:
        words += f" It has {components} components only, as there are no more training {noun}s."
    return words


def _generalisation(metrics: Mapping[str, Any], noun: str) -> Finding | None:
    if "psnr_train" not in metrics or "psnr_heldout" not in metrics:
        return None
    gap = metrics["psnr_train"] - metrics["psnr_heldout"]
    return Finding(
        f"Are unseen {noun}s kept as well as those learned from?",
        f"{gap:+.1f} dB".replace("-", "−"),
        "good" if gap <= 1 else "fair" if gap <= 3 else "bad",
        f"{metrics['psnr_train']:.1f} dB on training {noun}s, {metrics['psnr_heldout']:.1f} dB on held-out ones, "
        "whose latents were refined. What training ones have on top was learned by heart.",
    )


def _borders(metrics: Mapping[str, Any]) -> Finding | None:
    key = _first(metrics, "border_step_ratio_heldout", "border_step_ratio_train")
    if key is None:
        return None
    excess = abs(metrics[key] - 1)
    return Finding(
        "Can the borders of cells be seen?",
        f"{metrics[key]:.2f} ×",
        "good" if excess <= 0.05 else "fair" if excess <= 0.15 else "bad",
        "Steps between pixels across the borders of cells, against those of the originals there; 1 is invisible.",
    )


def _student(distances: Mapping[str, float]) -> Finding | None:
    """The student's best distance beside the teacher's best, between other real latents and Gaussian ones."""
    best = {
        who: min(((value, name) for name, value in distances.items() if name.startswith(who)), default=None)
        for who in ("student", "teacher")
    }
    if best["student"] is None or best["teacher"] is None:
        return None
    (value, name), (of_teacher, teacher) = best["student"], best["teacher"]
    steps, teacher_steps = (each.rpartition("_")[2] for each in (name, teacher))
    return Finding(
        "Does the student draw as well in fewer steps?",
        f"{value:.3g} in {steps} step{'s' if steps != '1' else ''}",
        "good" if value <= 1.5 * of_teacher else "fair" if value <= 4 * of_teacher else "bad",
        f"Energy distance of its latents from the data; the teacher reaches {of_teacher:.3g} in {teacher_steps}.",
    )


def _speed(latencies: Sequence[Mapping[str, Any]], noun: str) -> Finding | None:
    rows = [row for row in latencies if row["work"] == f"noise to {noun}" and row["batch"] == 1]
    if not rows:
        return None
    fastest = min(rows, key=lambda row: row["milliseconds"])
    return Finding(
        f"How long does a {noun} take?",
        f"{fastest['milliseconds']:.1f} ms",
        "open",
        f"From noise, with {fastest['runtime']} on the processor below, one at a time.",
    )


def _place(value: float, better: float, worse: float) -> float:
    return min(max((value - better) / (worse - better), 0.0), 1.0)


def _first(metrics: Mapping[str, Any], *names: str) -> str | None:
    return next((name for name in names if isinstance(metrics.get(name), float)), None)


def _short(value: float) -> str:
    return f"{value:.3g}"
