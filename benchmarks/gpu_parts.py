"""The parts of `benchmarks/gpu.py`, which starts this file for each: `gpu_parts.py PART OUT DEVICE SECONDS [tiny]`.

A part is a list of works by name. Each leaves its figures in OUT/parts/PART.json as soon as it has them; one that is
there is passed over.
"""

import json
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from fitting import Setting, Work, auto_decoding, decoding, encoder_and_mixing, encoding, meta_learning, paper_model
from sampling import draw, milliseconds, papers_pipeline
from torch import Tensor

from latent_prior.denoisers import ResMLPDenoiser
from latent_prior.diffusion import sampling_scheduler, student_scheduler
from latent_prior.fixed_sampler import FixedSampler
from latent_prior.pipeline import MNIFPipeline
from mnif.models.mnif_model import MNIFModel
from mnif.utils.files import write_json
from mnif.utils.json_files import read_json

ROOT = Path(__file__).resolve().parents[1]

Figures = dict[str, Any]
Works = Iterator[tuple[str, Callable[[], Figures]]]


@dataclass(frozen=True)
class Place:
    """Where a part works.

    Attributes:
        output_dir: of the script.
        device: of models and data.
        tiny: the smallest sizes that still do everything.
        deadline: by ``time.monotonic()``.
    """

    output_dir: Path
    device: torch.device
    tiny: bool
    deadline: float

    def settings(self) -> list[Setting]:
        """Precisions to measure in: TF32 and bfloat16 on a GPU."""
        is_gpu = self.device.type == "cuda"
        size, least = (128, 1e-4) if self.tiny else (8192 if is_gpu else 1536, 0.05)
        first = "tf32" if is_gpu else "float32"
        return [Setting(self.device, precision, size, least) for precision in (first, "bf16")]

    @property
    def rounds(self) -> int:
        return 1 if self.tiny else 7


FILES_OF_TESTS = ("end_to_end/test_gpu.py", "evals/test_inception.py", "end_to_end/test_gpu_engines.py")


def tests(place: Place) -> Works:
    """`pytest -m gpu`, a file at a time."""
    for name in FILES_OF_TESTS[: 1 if place.tiny else None]:
        yield f"pytest -m gpu tests/{name}", partial(tested, f"tests/{name}")


def tested(path: str) -> Figures:
    if find_spec("pytest") is None:
        return {"left out": "pytest is not installed"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-rfEs", "-p", "no:cacheprovider", path]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(found.stdout, found.stderr, flush=True)
    lines = (found.stdout + found.stderr).splitlines() or [""]
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"summary": lines[-1], "passed": found.returncode in (0, 5), "failures": failures}


Sizes = tuple[int, int, int, int]

SMALL, S, TINY = (32, 4, 32, 128), (256, 4, 64, 1024), (4, 1, 16, 8)
"""Bases, depth, width and numbers in a latent; S are those of the paper's small models of pictures."""

TINY_FORM = {"resolution": 16, "num_bases": 4, "width": 8, "latent_dim": 8, "cells": 2}


def fields(place: Place) -> Works:
    """Steps of learning in the paper's form, and latents to pictures, ours beside the plain form."""
    sized: list[tuple[str, Sizes, int, int]] = [("S, 64×64", S, 64, 32), ("K32 L4 W32 H128, 32×32", SMALL, 32, 256)]
    ways = {"CAVIA second order": meta_learning, "auto-decoding": auto_decoding, "encoder": encoding}
    for size, sizes, resolution, batch in [("tiny", TINY, 16, 4)] if place.tiny else sized:
        for way, make in ways.items():
            name = f"{way}, {size}, batch {batch}"
            yield from beside_plain(place, name, partial(make, name, *sizes, resolution, batch))
    form, batch, few = ("tiny", 4, TINY_FORM) if place.tiny else ("default form, 32×32", 1024, {})
    for learns, kind in ((False, "forward"), (True, "training step")):
        name = f"encoder + mixing, {form}, batch {batch}, {kind}"
        yield from beside_plain(place, name, partial(encoder_and_mixing, name, batch, learns, **few))
    size, sizes, resolution = ("tiny", TINY, 16) if place.tiny else ("S, 64×64", S, 64)
    for batch in (1, 4) if place.tiny else (1, 32, 1024):
        name = f"decode {size}, batch {batch}"
        yield from beside_plain(place, name, partial(decoding, name, batch, sizes, resolution))


def beside_plain(place: Place, name: str, make: Callable[[], Work]) -> Works:
    """A work in each precision."""

    def measured(setting: Setting) -> Figures:
        torch.set_float32_matmul_precision("highest" if setting.precision == "float32" else "high")
        found = make().figures(setting, place.rounds, with_plain=True)
        if name.startswith(("CAVIA second order, S,", "CAVIA second order, tiny")):
            found["hours of celeba-hq-s, stage one"] = 800 * 27_000 / found["ours, images/s"] / 3600
        return found

    for setting in place.settings():
        yield f"{name}, {setting.precision}", partial(measured, setting)


def sampling(place: Place) -> Works:
    """Noise to pixels at one and eight steps, beside the paper's prior with 1,000 steps."""
    torch.set_float32_matmul_precision("high")
    sizes, resolution = (TINY, 16) if place.tiny else (S, 64)
    decoder = paper_model(*sizes, resolution)
    ours = untrained_pipeline(decoder).to(place.device)
    many = 4 if place.tiny else 1024
    for batch in (1, many):
        for who, steps in (("student, 1 step", 1), ("teacher, 8 steps", 8)):
            yield f"{who}, batch {batch}", partial(drawing, place, draw(ours, steps, batch), batch)
    yield "student, 1 step, batch 1, CUDA graph", partial(in_a_graph, place, ours)
    yield "the paper's prior, 1000 steps, batch 1", partial(papers_drawing, place, decoder)


def untrained_pipeline(decoder: MNIFModel) -> MNIFPipeline:
    """The default teacher and student for a decoder; time does not depend on weights."""
    size = {"latent_dim": decoder.config.latent_dim, "decoder_fingerprint": decoder.fingerprint()}
    student = ResMLPDenoiser(**size, width=256, distilled_steps=(1, 2, 4))
    return MNIFPipeline(decoder, ResMLPDenoiser(**size), sampling_scheduler("x0"), student, student_scheduler())


def drawing(place: Place, work: Callable[[], object], batch: int) -> Figures:
    p50 = milliseconds(work, 3 if place.tiny else 101 if batch == 1 else 21)
    return {"p50, ms": p50, "pictures/s": 1e3 * batch / p50}


def papers_drawing(place: Place, decoder: MNIFModel) -> Figures:
    """What 1,000 steps take, worked out from two smaller numbers of them: every step does the same."""
    theirs = papers_pipeline(decoder, **({"width": 32, "depth": 2} if place.tiny else {})).to(place.device)
    few, more = (2, 4) if place.tiny else (10, 60)
    begun, ended = (milliseconds(draw(theirs, steps), 3) for steps in (few, more))
    a_step = (ended - begun) / (more - few)
    p50 = ended + (1000 - more) * a_step
    return {"p50, ms": p50, "pictures/s": 1e3 / p50, "extrapolated": f"from {few} and {more} steps"}


def in_a_graph(place: Place, pipeline: MNIFPipeline) -> Figures:
    """One step at batch 1 as a CUDA graph, with the ways from and to the CPU, beside the same calls one by one."""
    draw, noise = FixedSampler(pipeline, 1, 1), torch.randn(1, pipeline.decoder.config.latent_dim)

    @torch.no_grad()
    def one_by_one() -> Tensor:
        return draw.drawn(noise.to(place.device)).cpu()

    found = drawing(place, lambda: draw(noise).cpu(), 1)
    if place.device.type != "cuda":
        return found | {"recorded": "no: there are CUDA graphs on CUDA devices alone"}
    found |= {"p50 without a graph, ms": milliseconds(one_by_one, 101)}
    return found | {"largest difference": float((draw(noise).cpu() - one_by_one()).abs().max())}


def training(place: Place) -> Works:
    """`mnif fit`, `prior`, `distill`, `sample` and `eval` on a built-in set, as many steps as there is time for."""
    tf32 = ["--allow_tf32"] if place.device.type == "cuda" else []
    data = ["--data", "avatars:open-peeps:64" if place.tiny else "avatars"]
    if any(find_spec(name) is None for name in ("dicebear", "dicebear_styles", "resvg_py")):
        data = ["--data", "furniture-views", "--signal", "image"]
    size = ["--num_bases", "4", "--width", "8", "--latent_dim", "8", "--cells", "2"] if place.tiny else []
    fit = ["fit", *data, "--resolution", "16" if place.tiny else "64", "--latent_noise", "0.1", *size, *tf32]
    run, pilot = place.output_dir / "training", place.output_dir / "pilot"
    few = 10 if place.tiny else 300
    yield "pilot", partial(piloted, place, [*fit, "--output_dir", str(pilot), "--max_train_steps", str(few)], pilot)
    many = figures_of(place, "training")["pilot"].get("steps", few)
    yield "fit", partial(command, [*fit, "--output_dir", str(run), "--max_train_steps", str(many)], run)
    sizes = ["--width", "16", "--depth", "1"] if place.tiny else []
    steps = ["--max_train_steps", "10" if place.tiny else "4000"]
    prior = ["prior", "--run", str(run), "--preset", "edge", "--dropout", "0", "--learning_rate", "2e-3", *tf32]
    yield "prior", partial(command, [*prior, *sizes, *steps], run)
    pairs = ["--num_pairs", "64", "--matching_steps", "10", *steps] if place.tiny else []
    yield "distill", partial(command, ["distill", "--run", str(run), *sizes, *pairs, *tf32], run)
    model = ["--model", str(run / "model")]
    num = ["--num_samples", "4" if place.tiny else "64"]
    for kind, more in (("samples", []), ("samples_1_step", ["--num_inference_steps", "1"])):
        folder = place.output_dir / kind
        yield kind, partial(command, ["sample", *model, *num, *more, "--output_dir", str(folder)], folder)
    yield "model", partial(half_precision, run, place.output_dir / "model")
    num = ["--num_samples", "16"] if place.tiny else ["--num_samples", "1000"]
    reference = ["--reference", data[1], "--output_dir", str(place.output_dir / "eval")]
    yield "eval", partial(command, ["eval", *model, *reference, *num], place.output_dir / "eval")


def piloted(place: Place, flags: list[str], run: Path) -> Figures:
    """The rate of steps, and how many fill two fifths of the time left, from a short fit that is thrown away."""
    found = command(flags, run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = [(line["step"], line["seconds"]) for line in lines if line["stage"] == "fit"]
    (ended, stopped), begun = timed[-1], [each for each in timed if each[0] < timed[-1][0]]
    begin, started = begun[0] if begun else (0, 0.0)
    rate = (ended - begin) / max(stopped - started, 1e-3)
    shutil.rmtree(run)
    seconds = 0.4 * (place.deadline - time.monotonic())
    steps = 10 if place.tiny else int(min(max(rate * seconds, 300), 100_000))
    return {"seconds": found["seconds"], "steps/s": rate, "steps": steps}


def command(flags: list[str], folder: Path) -> Figures:
    """Runs a command of `mnif` in this process; its seconds, and what metrics it has written into a folder."""
    from mnif.cli import main

    print("mnif", " ".join(flags), flush=True)
    started = time.perf_counter()
    code = main(flags)
    if code:
        raise RuntimeError(f"mnif {flags[0]} ended with exit code {code}")
    figures = {"seconds": time.perf_counter() - started}
    if not (folder / "metrics.json").is_file():
        return figures
    metrics = read_json(folder / "metrics.json")
    return figures | {"metrics": metrics.get(flags[0], metrics)}  # later stages have a part of their own there


def half_precision(run: Path, folder: Path) -> Figures:
    """Writes the model with weights in half precision."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from ship_model import ship

    shutil.rmtree(folder, ignore_errors=True)
    fingerprint = ship(run, folder)
    megabytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    return {"MB": megabytes, "asked, MB": 16, "sha256": fingerprint}


def machine(device: torch.device) -> Figures:
    """What figures depend on."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    found["triton"] = version("triton") if find_spec("triton") else None
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {"device": card.name, "compute capability": f"{card.major}.{card.minor}", "cuda": torch.version.cuda}
        return found | {"memory, GB": card.total_memory / 1e9, "multiprocessors": card.multi_processor_count}
    return found | {"device": platform.processor() or platform.machine()}


WORKS = {"tests": tests, "fields": fields, "sampling": sampling, "training": training}


def path_of(place: Place, part: str) -> Path:
    return place.output_dir / "parts" / f"{part}.json"


def figures_of(place: Place, part: str) -> dict[str, Figures]:
    path = path_of(place, part)
    rows = read_json(path)["rows"] if path.is_file() else []
    return {row.pop("work"): row for row in rows}


def run(part: str, place: Place) -> None:
    """Does the works of a part that are missing; ends with the first that fails, which counts as done."""
    rows = figures_of(place, part)
    kept = {"device": str(place.device), "tiny": place.tiny, "machine": machine(place.device)}

    def write(finished: bool) -> None:
        listed = [{"work": name} | figures for name, figures in rows.items()]
        write_json(path_of(place, part), kept | {"finished": finished, "rows": listed})

    for name, work in WORKS[part](place):
        if name in rows:
            continue
        try:
            rows[name] = work()
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            rows[name] = {"failed": f"{type(error).__name__}: {error}".strip().splitlines()[0]}
        write(finished=False)
        print(part, name, rows[name], flush=True)
        if "failed" in rows[name]:
            sys.exit(1)
    write(finished=True)


if __name__ == "__main__":
    _, part, output_dir, device, seconds, *tiny = sys.argv
    run(part, Place(Path(output_dir), torch.device(device), bool(tiny), time.monotonic() + float(seconds)))
