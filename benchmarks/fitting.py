"""Pictures per second of learning and decoding the paper's fields, beside the plain form of the same work.

    python benchmarks/fitting.py

Plain is what the equations say, written down in PyTorch: mixing makes a [B, M, parameters] tensor, fields are batched
products and sines, gradients are autograd's. Ours goes through the product's own classes. Both are timed in
alternating rounds; medians are printed, with the share of the machine's own matrix-product rate that the fields'
products reach, which is measured in between.
"""

import resource
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor

from evals.timing import settled_seconds
from mnif.latents.embedding import LatentEmbedding
from mnif.latents.inner_loop import InnerLoop
from mnif.models.mnif_model import MNIFModel
from mnif.models.siren import BakedField
from mnif.signals.image import Image
from mnif.training.methods import AutoDecoderMethod, MetaMethod


@dataclass
class Arguments:
    """Measure learning and decoding in the paper's sizes."""

    rounds: int = 7
    """Timed rounds of each; medians are printed."""
    plain: bool = True
    """Time the plain form too; the large one takes about ten seconds and 4 GB a step."""
    only: str = ""
    """Only works whose name holds this text."""


def main(arguments: Arguments) -> None:
    works = [
        meta_learning("CAVIA, K32 L4 W32 H128, 32x32, batch 32", 32, 4, 32, 128, 32, 32),
        meta_learning("CAVIA, K256 L4 W64 H1024, 64x64, batch 32", 256, 4, 64, 1024, 64, 32),
        auto_decoding("auto-decoding, K32 L4 W32 H128, 32x32, batch 64", 32, 4, 32, 128, 32, 64),
        decoding("decode S (K256 L4 W64 H1024), 64x64, batch 1", 1),
        decoding("decode S (K256 L4 W64 H1024), 64x64, batch 32", 32),
        mixing("mix S (latent → weights of its field), batch 1", 1),
        baked("evaluate S baked, 64x64, batch 1", 1),
        baked("evaluate S baked, 64x64, batch 32", 32),
    ]
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'work':48} {'ours, images/s':>15} {'plain, images/s':>16} {'ratio':>6} {'of peak':>8} {'peak MB':>8}")
    for make in works:
        if arguments.only in make.name:
            print(make.measured(arguments.rounds, arguments.plain))


@dataclass
class Work:
    """One row: how to prepare it, and the pictures, passes and multiply-adds of one call."""

    name: str
    images: int
    operations: float
    prepare: Callable[[], tuple[Callable[[], object], Callable[[], object]]]

    def measured(self, rounds: int, with_plain: bool) -> str:
        """The row's line."""
        ours, plain = self.prepare()
        functions = [ours, matrix_product] + ([plain] if with_plain else [])
        times: list[list[float]] = [[] for _ in functions]
        ours()
        megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
        few = max(3, rounds // 3) if with_plain and self.operations * 3 > 1e11 else rounds
        for number in range(few + 2):
            for function, seconds in zip(functions, times, strict=True):
                taken = settled_seconds(function)
                if number >= 2 or function is plain:
                    seconds.append(taken)
        medians = [sorted(seconds)[len(seconds) // 2] for seconds in times]
        rate, peak = self.images / medians[0], 2 * SIZE**3 / medians[1]
        share = self.operations / medians[0] / peak
        slow, ratio = "", ""
        if with_plain:
            slow, ratio = f"{self.images / medians[2]:.1f}", f"{medians[2] / medians[0]:.1f}"
        return f"{self.name:48} {rate:15.1f} {slow:>16} {ratio:>6} {share:8.0%} {megabytes:8.0f}"


SIZE = 1536
A, B = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)


def matrix_product() -> Tensor:
    return A @ B


def paper_model(bases: int, depth: int, width: int, latent_dim: int, resolution: int) -> MNIFModel:
    torch.manual_seed(0)
    return MNIFModel(
        resolution=resolution,
        num_bases=bases,
        depth=depth,
        width=width,
        latent_dim=latent_dim,
        cells=1,
        mixing="average",
        omega=30.0,
        output_sine=True,
    )


def multiply_adds(model: MNIFModel) -> int:
    return sum(shape.inputs * shape.outputs for shape in model.shapes)


def plain_rows(model: MNIFModel, latents: Tensor) -> Tensor:
    coefficients = model.coefficients(latents)[:, 0]
    rows = [(coefficients[:, layer, :, None] * bases[None]).sum(dim=1) for layer, bases in enumerate(model.bases)]
    return torch.cat(rows, dim=1)


def plain_decode(model: MNIFModel, latents: Tensor, coordinates: Tensor) -> Tensor:
    return BakedField(model.shapes, plain_rows(model, latents), True).evaluate_layers(coordinates)


def meta_learning(name: str, bases: int, depth: int, width: int, latent_dim: int, resolution: int, batch: int) -> Work:
    model = paper_model(bases, depth, width, latent_dim, resolution)
    steps = 3

    def prepare() -> tuple[Callable[[], object], Callable[[], object]]:
        signal = Image(resolution, 3)
        fitting = MetaMethod(model, signal, InnerLoop(latent_dim, steps, 1 / 32), second_order=True)
        optimizer = torch.optim.AdamW(fitting.parameters(), lr=1e-4, fused=True)
        images = torch.randint(0, 256, (batch, resolution, resolution, 3), dtype=torch.uint8)
        row = torch.arange(batch)
        coordinates = model.grid().coordinates
        targets = (images.float() / 127.5 - 1).view(batch, -1, 3)
        rates = fitting.inner_loop.rates

        def ours() -> None:
            optimizer.zero_grad()
            fitting(row=row, key=row, images=images).backward()
            optimizer.step()

        def plain() -> None:
            optimizer.zero_grad()
            latents = torch.zeros(batch, latent_dim, requires_grad=True)
            for _ in range(steps):
                error = (plain_decode(model, latents, coordinates) - targets).square().mean()
                (gradient,) = torch.autograd.grad(error, latents, create_graph=True)
                latents = latents - rates * gradient
            (plain_decode(model, latents, coordinates) - targets).square().mean().backward()
            optimizer.step()

        return ours, plain

    passes = 3 + 9 * steps
    return Work(name, batch, 2.0 * multiply_adds(model) * resolution**2 * batch * passes, prepare)


def auto_decoding(name: str, bases: int, depth: int, width: int, latent_dim: int, resolution: int, batch: int) -> Work:
    model = paper_model(bases, depth, width, latent_dim, resolution)

    def prepare() -> tuple[Callable[[], object], Callable[[], object]]:
        rows = LatentEmbedding(4096, latent_dim, batch, 1e-2, seed=0)
        fitting = AutoDecoderMethod(model, Image(resolution, 3), rows, 1e-4)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        images = torch.randint(0, 256, (batch, resolution, resolution, 3), dtype=torch.uint8)
        row = torch.arange(batch)
        coordinates = model.grid().coordinates
        targets = (images.float() / 127.5 - 1).view(batch, -1, 3)
        table = torch.nn.Embedding(4096, latent_dim)
        of_table = torch.optim.Adam(table.parameters(), lr=1e-2)

        def ours() -> None:
            optimizer.zero_grad()
            fitting(row=row, key=row, images=images).backward()
            rows.step()
            optimizer.step()

        def plain() -> None:
            optimizer.zero_grad()
            of_table.zero_grad()
            (plain_decode(model, table(row), coordinates) - targets).square().mean().backward()
            of_table.step()
            optimizer.step()

        return ours, plain

    return Work(name, batch, 2.0 * multiply_adds(model) * resolution**2 * batch * 3, prepare)


def decoding(name: str, batch: int) -> Work:
    model = paper_model(256, 4, 64, 1024, 64)

    def prepare() -> tuple[Callable[[], object], Callable[[], object]]:
        latents, coordinates = torch.randn(batch, 1024), model.grid().coordinates
        return (
            torch.no_grad()(lambda: model(latents)),
            torch.no_grad()(lambda: plain_decode(model, latents, coordinates)),
        )

    return Work(name, batch, 2.0 * multiply_adds(model) * 64**2 * batch, prepare)


def mixing(name: str, batch: int) -> Work:
    model = paper_model(256, 4, 64, 1024, 64)

    def prepare() -> tuple[Callable[[], object], Callable[[], object]]:
        latents = torch.randn(batch, 1024)
        return (
            torch.no_grad()(lambda: model.bake(model.coefficients(latents))),
            torch.no_grad()(lambda: plain_rows(model, latents)),
        )

    return Work(name, batch, 2.0 * sum(each.numel() for each in model.parameters()) * batch, prepare)


def baked(name: str, batch: int) -> Work:
    model = paper_model(256, 4, 64, 1024, 64)

    @torch.no_grad()
    def prepare() -> tuple[Callable[[], object], Callable[[], object]]:
        field, coordinates = model.bake(model.coefficients(torch.randn(batch, 1024))), model.grid().coordinates
        return (
            torch.no_grad()(lambda: field(coordinates)),
            torch.no_grad()(lambda: field.evaluate_layers(coordinates)),
        )

    return Work(name, batch, 2.0 * multiply_adds(model) * 64**2 * batch, prepare)


if __name__ == "__main__":
    main(tyro.cli(Arguments, use_underscores=True))
