"""What a run will cost, worked out before it starts."""

from mnif.fit_arguments import FitArguments
from mnif.modeling import MNIFModel
from mnif.radiance import RadianceField
from mnif.signals import GridSignal, Signal

SUSTAINED = 5e12  # floating-point operations a second: a quarter of an A100's float32 peak


def estimate_lines(arguments: FitArguments, decoder: MNIFModel, signal: Signal, instances: int) -> list[str]:
    """Sizes, work and memory of a run, as lines to print.

    Work counts the fields' matrix products: a forward pass is one, its gradient two more; an inner step of second
    order nine, of first order three. Memory counts parameters, gradients, Adam's moments, and the activations that
    PyTorch keeps for a step on a GPU (the compiled operator for CPUs keeps none).
    """
    config = decoder.config
    field = decoder.bake(decoder.coefficients(decoder.bases[0].new_zeros(1, config.latent_dim)))
    points = points_per_step(signal, decoder)
    passes = _passes(arguments)
    operations = 2.0 * points * field.multiply_adds_per_point() * passes
    operations += 6.0 * sum(bases.numel() for bases in decoder.bases) * config.cells**config.dimensions
    batch = min(arguments.train_batch_size, instances)
    total = operations * batch * arguments.max_train_steps
    learned = decoder.num_parameters()
    rows = instances * config.latent_dim if arguments.method == "auto-decoding" else 0
    kept = points * sum(shape.outputs + shape.inputs for shape in decoder.shapes) * batch
    if arguments.method == "meta":
        kept *= 3 * arguments.inner_steps + 1 if arguments.inner_order == "second" else 1
    megabytes = (16 * learned + 12 * rows + 4 * kept) / 1e6
    return [
        f"{instances:,} {signal.unit}s to train, {arguments.max_train_steps:,} steps of {batch}",
        f"decoder: {learned:,} parameters; {len(field.rows)} field(s) of {field.parameters_per_field():,} parameters",
        f"a step looks at {points:,} points of each {signal.unit}: {operations / 1e9:.3g} GFLOP each",
        f"about {total / SUSTAINED / 3600:.2g} GPU hours at {SUSTAINED / 1e12:g} TFLOP/s sustained (a quarter of an "
        "A100's float32 peak; an assumption, not a measurement)",
        f"about {megabytes:,.0f} MB for parameters, optimizer and activations"
        + (f", of which {12 * rows / 1e6:,.0f} MB latents, shared out over processes" if rows else ""),
    ]


def points_per_step(signal: Signal, decoder: MNIFModel) -> int:
    """Points of one instance that a step of learning evaluates, those counted twice where cells overlap."""
    if isinstance(signal, GridSignal):
        grid = decoder.grid(signal.resolution, signal.stride)
        return grid.coordinates.shape[1] * decoder.config.cells**decoder.config.dimensions
    if isinstance(signal, RadianceField):
        return signal.rays * signal.samples
    return decoder.grid().coordinates.shape[1]


def _passes(arguments: FitArguments) -> int:
    """Forward passes that the work of a step amounts to."""
    if arguments.method != "meta":
        return 3
    return 3 + arguments.inner_steps * (9 if arguments.inner_order == "second" else 3)
