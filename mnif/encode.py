"""`mnif encode`: finds the latents of new data on frozen bases."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from mnif.arguments import parse_arguments
from mnif.data import load_images
from mnif.encoder import PatchEncoder
from mnif.errors import UserError
from mnif.files import write_json
from mnif.fitting import encoded_latents, in_batches, psnr
from mnif.latents import LatentTable
from mnif.model_folder import load_component
from mnif.modeling import MNIFModel
from mnif.runs import command_line, peak_memory_megabytes


@dataclass(kw_only=True)
class EncodeArguments:
    """Find the latents of new data on frozen bases; writes latents.safetensors and metrics.json."""

    model: Path
    """The model folder, RUN/model."""
    data: str
    """A built-in set (twemoji), a folder of pictures, or an .npz file."""
    output_dir: Path
    """Gets latents.safetensors and metrics.json."""
    refinement_steps: int = 60
    """Adam steps on each latent; 0 takes the encoder's as they are. Without an encoder the latents start from zero
    and take five times as many."""
    batch_size: int = 256
    """Pictures at a time; changes speed and memory, not the result."""


def main(arguments: list[str]) -> None:
    """Runs `mnif encode`."""
    encode(parse_arguments(EncodeArguments, arguments, "mnif encode"))


def encode(arguments: EncodeArguments) -> None:
    """Writes the latents of ``arguments.data`` to ``arguments.output_dir``.

    Raises:
        UserError: the model or the data cannot be read, or a flag is out of range.
    """
    if arguments.batch_size < 1:
        raise UserError(f"--batch_size {arguments.batch_size}: must be at least 1")
    if arguments.refinement_steps < 0:
        raise UserError(f"--refinement_steps {arguments.refinement_steps}: must be at least 0")
    decoder = load_component(MNIFModel, arguments.model, "decoder")
    encoder = None
    if (arguments.model / "encoder").is_dir():
        encoder = load_component(PatchEncoder, arguments.model, "encoder")
    data = load_images(arguments.data, decoder.config.resolution)
    values = torch.from_numpy(data.images).float() / 127.5 - 1
    started = time.perf_counter()
    latents = encoded_latents(decoder, encoder, values, arguments.refinement_steps, arguments.batch_size, True)
    seconds = time.perf_counter() - started
    quality = psnr(in_batches(decoder, latents, arguments.batch_size), values)
    output = arguments.output_dir
    held_out = torch.zeros(len(latents), dtype=torch.bool)
    LatentTable(latents, data.ids, held_out, decoder.fingerprint(), data.name).save(output / "latents.safetensors")
    write_json(
        output / "metrics.json",
        {
            "psnr": quality.mean().item(),
            "psnr_per_image": dict(zip(data.ids, (round(q, 3) for q in quality.tolist()), strict=True)),
            "images_per_second": len(latents) / seconds,
            "seconds": round(seconds, 2),
            "command": command_line(),
            "peak_rss_mb": peak_memory_megabytes(),
        },
    )
    worst = ", ".join(f"{data.ids[row]} ({quality[row]:.1f} dB)" for row in quality.argsort()[:5])
    print(f"{output}: {len(latents)} latents, {quality.mean():.2f} dB on average; fitting worst: {worst}")
