"""Pictures per second of learning and decoding the paper's fields, beside the plain form of the same work.

    python benchmarks/fitting.py

Plain is what the equations say, written down in PyTorch: mixing makes a [B, M, parameters] tensor, fields are batched
products and sines, gradients are autograd's. Ours goes through the product's own classes. Both are timed in
alternating rounds; medians are printed, with the share of the machine's own matrix-product rate that the fields'
products reach, which is measured in between. `benchmarks/gpu.py` takes the same works to a GPU.
"""

import resource
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch
import tyro
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from evals.timing import settled_seconds
from mnif.latents.embedding import LatentEmbedding
from mnif.latents.inner_loop import InnerLoop
from mnif.models.mnif_model import MNIFModel
from mnif.models.siren import BakedField
from mnif.signals.image import Image
from mnif.training.methods import AutoDecoderMethod, EncoderMethod, LearningMethod, MetaMethod


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
        encoder_and_mixing("encoder + mixing, default form, 32x32, batch 256", 256, False),
        encoder_and_mixing("encoder + mixing, learning, batch 256", 256, True),
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


@dataclass(frozen=True)
class Setting:
    """Where works run, and in which precision.

    Attributes:
        device: of models and data.
        precision: of matrix products: ``"float32"``, ``"tf32"`` where a device has it, ``"bf16"`` by autocast.
        size: rows and columns of the matrix product that rates are set beside.
        least: seconds that a round lasts at least.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "float32"
    size: int = 1536
    least: float = 0.05

    def forward(self) -> torch.autocast:
        """The context of forward passes; backward passes stand outside, as Accelerate has it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def product(self) -> Callable[[], object]:
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        a, b = torch.randn(2, self.size, self.size, device=self.device, dtype=dtype)
        return lambda: a @ b

    def seconds(self, function: Callable[[], object]) -> float:
        """Of a call in a stream of calls, each waited for."""
        return settled_seconds(lambda: (function(), self.wait()), self.least)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def megabytes(self, function: Callable[[], object]) -> float:
        """The most that a call holds: of the GPU's memory, on a CPU that the process ever held."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        function()
        self.wait()
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e6
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


Prepared = tuple[Callable[[], object], Callable[[], object]]


@dataclass
class Work:
    """One row: how to prepare it, and the pictures, passes and multiply-adds of one call."""

    name: str
    images: int
    operations: float
    prepare: Callable[[Setting], Prepared]

    def measured(self, rounds: int, with_plain: bool) -> str:
        """The row's line."""
        few = max(3, rounds // 3) if with_plain and self.operations * 3 > 1e11 else rounds
        found = self.figures(Setting(), few, with_plain)
        slow, ratio = "", ""
        if with_plain:
            slow, ratio = f"{found['plain, images/s']:.1f}", f"{found['ratio']:.1f}"
        rate, share, megabytes = (found[name] for name in ("ours, images/s", "of peak", "ours, MB"))
        return f"{self.name:48} {rate:15.1f} {slow:>16} {ratio:>6} {share:8.0%} {megabytes:8.0f}"

    def figures(self, setting: Setting, rounds: int, with_plain: bool) -> dict[str, float]:
        """Medians of alternating rounds, the first two left out; of the plain form too, if its memory suffices."""
        ours, plain = self.prepare(setting)
        functions = {"ours": ours, "product": setting.product()}
        megabytes = {"ours, MB": setting.megabytes(ours)}
        if with_plain:
            try:
                megabytes["plain, MB"] = setting.megabytes(plain)
                functions["plain"] = plain
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
        seconds: dict[str, list[float]] = {name: [] for name in functions}
        for number in range(rounds + 2):
            for name, function in functions.items():
                taken = setting.seconds(function)
                if number >= 2 or name == "plain":
                    seconds[name].append(taken)
        medians = {name: median(times) for name, times in seconds.items()}
        peak = 2 * setting.size**3 / medians["product"]
        found = {
            "ours, images/s": self.images / medians["ours"],
            "of peak": self.operations / medians["ours"] / peak,
            "peak, TFLOP/s": peak / 1e12,
        }
        if "plain" in medians:
            found["plain, images/s"] = self.images / medians["plain"]
            found["ratio"] = medians["plain"] / medians["ours"]
        return found | megabytes


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
    coefficients = model.coefficients(latents).flatten(0, 1)
    rows = [row.expand(len(coefficients), -1) for row in model.shared]
    for layer, bases in enumerate(model.bases):
        mixed = (coefficients[:, layer, :, None] * bases[None]).sum(dim=1)
        rows.append(mixed + model.means[layer] if model.means else mixed)
    return torch.cat(rows, dim=1)


def plain_decode(model: MNIFModel, latents: Tensor, coordinates: Tensor) -> Tensor:
    return BakedField(model.shapes, plain_rows(model, latents), True).evaluate_layers(coordinates)


def pictures(model: MNIFModel, batch: int, device: torch.device) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A batch as methods of learning take it; the coordinates and values [B, points, 3] that the plain form takes."""
    resolution = model.config.resolution
    images = torch.randint(0, 256, (batch, resolution, resolution, 3), dtype=torch.uint8).to(device)
    row = torch.arange(batch, device=device)
    targets = (images.float() / 127.5 - 1).view(batch, -1, 3)
    return {"row": row, "key": row, "images": images}, model.grid().coordinates, targets


def step(
    setting: Setting, loss: Callable[[], Tensor], *optimizers: torch.optim.Optimizer | LatentEmbedding
) -> Callable[[], None]:
    """A step of training."""

    def taken() -> None:
        for optimizer in optimizers:
            if isinstance(optimizer, torch.optim.Optimizer):
                optimizer.zero_grad()
        with setting.forward():
            found = loss()
        found.float().backward()
        for optimizer in optimizers:
            optimizer.step()

    return taken


def adam_of(method: LearningMethod) -> torch.optim.Optimizer:
    return torch.optim.AdamW(method.parameters(), lr=1e-4, fused=True)


def meta_learning(name: str, bases: int, depth: int, width: int, latent_dim: int, resolution: int, batch: int) -> Work:
    model = paper_model(bases, depth, width, latent_dim, resolution)
    steps = 3

    def prepare(setting: Setting) -> Prepared:
        inner_loop = InnerLoop(latent_dim, steps, 1 / 32)
        fitting = MetaMethod(model, Image(resolution, 3), inner_loop, second_order=True).to(setting.device)
        given, coordinates, targets = pictures(model, batch, setting.device)
        optimizer, rates = adam_of(fitting), fitting.inner_loop.rates

        def plain() -> Tensor:
            latents = torch.zeros(batch, latent_dim, requires_grad=True, device=setting.device)
            for _ in range(steps):
                error = (plain_decode(model, latents, coordinates) - targets).square().mean()
                (gradient,) = torch.autograd.grad(error, latents, create_graph=True)
                latents = latents - rates * gradient
            return (plain_decode(model, latents, coordinates) - targets).square().mean()

        return step(setting, lambda: fitting(**given), optimizer), step(setting, plain, optimizer)

    passes = 3 + 9 * steps
    return Work(name, batch, 2.0 * multiply_adds(model) * resolution**2 * batch * passes, prepare)


def auto_decoding(name: str, bases: int, depth: int, width: int, latent_dim: int, resolution: int, batch: int) -> Work:
    model = paper_model(bases, depth, width, latent_dim, resolution)

    def prepare(setting: Setting) -> Prepared:
        rows = LatentEmbedding(4096, latent_dim, batch, 1e-2, seed=0, device=setting.device)
        fitting = AutoDecoderMethod(model, Image(resolution, 3), rows, 1e-4).to(setting.device)
        given, coordinates, targets = pictures(model, batch, setting.device)
        optimizer = adam_of(fitting)
        table = torch.nn.Embedding(4096, latent_dim, device=setting.device)
        of_table = torch.optim.Adam(table.parameters(), lr=1e-2)

        def plain() -> Tensor:
            return (plain_decode(model, table(given["row"]), coordinates) - targets).square().mean()

        return step(setting, lambda: fitting(**given), rows, optimizer), step(setting, plain, of_table, optimizer)

    return Work(name, batch, 2.0 * multiply_adds(model) * resolution**2 * batch * 3, prepare)


def encoding(name: str, bases: int, depth: int, width: int, latent_dim: int, resolution: int, batch: int) -> Work:
    model = paper_model(bases, depth, width, latent_dim, resolution)

    def prepare(setting: Setting) -> Prepared:
        signal = Image(resolution, 3)
        fitting = EncoderMethod(model, signal, signal.encoder(latent_dim, 512), latent_noise=0.1).to(setting.device)
        given, coordinates, targets = pictures(model, batch, setting.device)
        optimizer = adam_of(fitting)

        def plain() -> Tensor:
            latents = fitting.encoder(targets.view(given["images"].shape))
            latents = latents + 0.1 * torch.randn_like(latents)
            return (plain_decode(model, latents, coordinates) - targets).square().mean()

        return step(setting, lambda: fitting(**given), optimizer), step(setting, plain, optimizer)

    return Work(name, batch, 2.0 * multiply_adds(model) * resolution**2 * batch * 3, prepare)


def encoder_and_mixing(name: str, batch: int, learns: bool, **sizes: int) -> Work:
    """Pictures to latents, coefficients and mixed weights, of the default form but for ``sizes``; fields stay unasked.

    What learns takes a step down the mean square of the mixed weights.
    """
    torch.manual_seed(0)
    model = MNIFModel(**sizes)
    signal = Image(model.config.resolution, 3)
    method = EncoderMethod(model, signal, signal.encoder(model.config.latent_dim, 512), latent_noise=0.0)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        given, *_ = pictures(model, 1, torch.device("cpu"))
        model.bake(model.coefficients(method.latents(signal.observe(given), given["row"])))

    def prepare(setting: Setting) -> Prepared:
        method.to(setting.device)
        given, *_ = pictures(model, batch, setting.device)

        def latents() -> Tensor:
            return method.latents(signal.observe(given), given["row"])

        def ours() -> Tensor:
            return model.bake(model.coefficients(latents())).params

        def plain() -> Tensor:
            return plain_rows(model, latents())

        if not learns:
            return drawn(setting, ours, plain)
        optimizer = adam_of(method)
        return (
            step(setting, lambda: ours().float().square().mean(), optimizer),
            step(setting, lambda: plain().float().square().mean(), optimizer),
        )

    return Work(name, batch, float(counted.get_total_flops()) * batch * (3 if learns else 1), prepare)


def drawn(setting: Setting, *functions: Callable[[], object]) -> Prepared:
    """Works without gradients, in the setting's precision."""

    def without_gradient(function: Callable[[], object]) -> Callable[[], object]:
        def called() -> object:
            with torch.no_grad(), setting.forward():
                return function()

        return called

    ours, plain = functions
    return without_gradient(ours), without_gradient(plain)


def decoding(
    name: str, batch: int, sizes: tuple[int, int, int, int] = (256, 4, 64, 1024), resolution: int = 64
) -> Work:
    """``sizes`` are bases, depth, width and numbers in a latent."""
    model = paper_model(*sizes, resolution)

    def prepare(setting: Setting) -> Prepared:
        model.to(setting.device)
        latents, coordinates = torch.randn(batch, sizes[-1]).to(setting.device), model.grid().coordinates
        return drawn(setting, lambda: model(latents), lambda: plain_decode(model, latents, coordinates))

    return Work(name, batch, 2.0 * multiply_adds(model) * resolution**2 * batch, prepare)


def mixing(name: str, batch: int) -> Work:
    model = paper_model(256, 4, 64, 1024, 64)

    def prepare(setting: Setting) -> Prepared:
        model.to(setting.device)
        latents = torch.randn(batch, 1024).to(setting.device)
        return drawn(setting, lambda: model.bake(model.coefficients(latents)), lambda: plain_rows(model, latents))

    return Work(name, batch, 2.0 * sum(each.numel() for each in model.parameters()) * batch, prepare)


def baked(name: str, batch: int) -> Work:
    model = paper_model(256, 4, 64, 1024, 64)

    @torch.no_grad()
    def prepare(setting: Setting) -> Prepared:
        model.to(setting.device)
        latents = torch.randn(batch, 1024).to(setting.device)
        field, coordinates = model.bake(model.coefficients(latents)), model.grid().coordinates
        return drawn(setting, lambda: field(coordinates), lambda: field.evaluate_layers(coordinates))

    return Work(name, batch, 2.0 * multiply_adds(model) * 64**2 * batch, prepare)


if __name__ == "__main__":
    main(tyro.cli(Arguments, use_underscores=True))
