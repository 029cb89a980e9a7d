"""A local page to try a model on: samples, the way between two, and a picture of one's own; gradio lays it out."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from latent_prior.pipeline import load_pipeline
from latent_prior.sampling import denoised, initial_noise, sample_latents, slerp
from latent_prior.settings import INFERENCE_STEPS
from mnif.data.batches import array_dataset
from mnif.latents.inference import infer_latents, load_latent_init
from mnif.signals.base import psnr
from mnif.signals.outputs import pictures_of_size, postprocess
from mnif.signals.registry import signal_of_model
from mnif.utils.errors import UserError, check_at_least
from mnif.utils.pixels import as_axes, crop_and_resize, save_animation, to_mode

if TYPE_CHECKING:
    from gradio import Blocks

_SIZES = (32, 64, 256)  # that a picture of one's own comes back in
_MOST = 64  # samples at once
_WORDS = "[Documentation](https://github.com/mnif/mnif/tree/main/docs) · [Source](https://github.com/mnif/mnif)"


class DemoApp:
    """What the page can do with a model.

    Args:
        model: the model folder.
        device: where it draws.

    Raises:
        UserError: a stage is missing or damaged.
    """

    def __init__(self, model: Path, device: torch.device | str = "cpu") -> None:
        self.pipeline = load_pipeline(model).to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.decoder = self.pipeline.decoder
        self.signal = signal_of_model(self.decoder)
        self.latent_init = load_latent_init(model, self.decoder, self.signal)
        if self.latent_init is not None:
            self.latent_init.to(device)
        self.takes_pictures = self.signal.name == "image"

    @torch.no_grad()
    def sample(
        self, seed: int, first: int, count: int, steps: int, resolution: int, truncation: float
    ) -> list[tuple[Image.Image, str]]:
        """Draws samples ``first`` and on of ``seed``, as `mnif sample` does, each with its number.

        Raises:
            UserError: a number is out of range.
        """
        _check(seed=seed, first=first)
        check_at_least(1, count=count, steps=steps, resolution=resolution)
        if count > _MOST:
            raise UserError(f"{count} samples: at most {_MOST} at once")
        if not 0 <= truncation <= 1:
            raise UserError(f"truncation {truncation:g}: must lie between 0 and 1")
        numbers = range(first, first + count)
        latents = sample_latents(self.pipeline, seed, numbers, steps, truncation=truncation)
        labels = [f"sample {number}" for number in numbers]
        return list(zip(self._drawn(latents, resolution), labels, strict=True))

    @torch.no_grad()
    def interpolate(
        self, seed: int, start: int, end: int, frames: int, steps: int, resolution: int
    ) -> list[Image.Image]:
        """Draws what lies on the sphere between the noise of two samples, both among the frames.

        Raises:
            UserError: a number is out of range.
        """
        _check(seed=seed, start=start, end=end)
        check_at_least(2, frames=frames)
        check_at_least(1, steps=steps, resolution=resolution)
        one, other = initial_noise(seed, [start, end], self.decoder.config.latent_dim)
        way = torch.from_numpy(slerp(one, other, np.linspace(0, 1, frames)))
        return self._drawn(denoised(self.pipeline, way, steps), resolution)

    def encode(self, picture: Image.Image | None, refinement_steps: int) -> tuple[list[tuple[Image.Image, str]], str]:
        """Finds the latent of a picture, and draws it at several sizes.

        Args:
            picture: of any size; its central part is taken.
            refinement_steps: of the search that follows the encoder or, without one, of a fifth of the search.

        Returns:
            The picture as the model gets it and what its latent draws, each with its size; and how well it fits.

        Raises:
            UserError: there is no picture, the model is not of pictures, or a number is out of range.
        """
        if picture is None:
            raise UserError("give a picture first")
        if not self.takes_pictures:
            raise UserError(f"this model is of {self.signal.noun}s; `mnif encode` finds their latents")
        check_at_least(0, refinement_steps=refinement_steps)
        height, width = as_axes(self.signal.grid_resolution, 2)
        pixels = crop_and_resize(picture, (height, width), self.decoder.config.channels).copy()
        rows = array_dataset({"images": pixels[None]})
        (latent,) = infer_latents(self.decoder, self.signal, rows, self.latent_init, refinement_steps)
        (batch,) = rows.batches(1, self.decoder.device)
        with torch.no_grad():
            fit = psnr(self.decoder(latent), self.signal.observe(batch).values).item()
            drawn = [(self._drawn(latent, size)[0], f"its latent at {size}") for size in _SIZES]
        given = Image.fromarray(pixels.squeeze())
        words = f"{fit:.1f} dB at {width} × {height}: {latent.shape[1]} numbers stand for {pixels.size:,}."
        return [(given, f"the picture at {max(height, width)}"), *drawn], words

    def _drawn(self, latents: torch.Tensor, resolution: int) -> list[Image.Image]:
        if self.takes_pictures:
            return pictures_of_size(self.decoder, latents, resolution)
        return postprocess(self.decoder, latents, "pil")


def _check(**numbers: int) -> None:
    check_at_least(0, **numbers)


def launch(app: DemoApp, folder: Path, host: str, port: int, block: bool = True, atlas: Path | None = None) -> Any:
    """Serves the page.

    Args:
        app: what it can do.
        folder: gets animations.
        host: the address to listen at.
        port: likewise.
        block: until it is stopped; else the server runs on, and its Blocks are returned to be closed.
        atlas: the page of `mnif atlas`, which is served as /atlas and linked, if there is one.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    import gradio

    page = _page(app, folder, atlas is not None)
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        server, _, _ = page.launch(
            server_name=host, server_port=port, prevent_thread_lock=True, theme=theme, allowed_paths=[str(folder)]
        )
    except OSError as error:
        raise UserError(f"--port {port}: {error}") from None
    if atlas is not None:
        _serve(server, "/atlas", atlas)
    if block:
        page.block_thread()
    return page


def _serve(server: Any, address: str, page: Path) -> None:
    """Serves a page of our own beside gradio's, which would offer it as a download."""
    from starlette.responses import FileResponse
    from starlette.routing import Route

    server.router.routes.insert(0, Route(address, lambda request: FileResponse(page, media_type="text/html")))


def _page(app: DemoApp, folder: Path, with_atlas: bool) -> "Blocks":
    """Lays the page out; what a model cannot do is not on it."""
    import gradio

    with gradio.Blocks(title="mnif", analytics_enabled=False) as page:
        decoder = app.decoder
        networks = f"{decoder.num_cells} networks for each {app.signal.noun}"
        words = f"[What each basis does](/atlas) · {_WORDS}" if with_atlas else _WORDS
        gradio.Markdown(f"# mnif\n{decoder.num_parameters():,} parameters, {networks}. {words}")
        with gradio.Tab("Samples"):
            _sample_tab(app)
        with gradio.Tab("Between two"):
            _interpolation_tab(app, folder)
        if app.takes_pictures:
            with gradio.Tab("Your own picture"):
                _encode_tab(app)
    return page


def _sample_tab(app: DemoApp) -> None:
    import gradio

    with gradio.Row():
        seed, first = gradio.Number(0, label="Seed", precision=0), gradio.Number(0, label="First", precision=0)
        count = gradio.Slider(1, _MOST, 16, step=1, label="Number")
        steps, resolution = _drawing(app)
        truncation = gradio.Slider(0, 1, 1, label="Truncation; 1: all variety")
    button = gradio.Button("Draw", variant="primary")
    gallery = gradio.Gallery(label="Samples", columns=8, object_fit="contain", format="png")
    inputs = [seed, first, count, steps, resolution, truncation]
    button.click(_told(app.sample), inputs, gallery, api_name="sample")


def _interpolation_tab(app: DemoApp, folder: Path) -> None:
    import gradio

    def animate(*numbers: int) -> tuple[str, list[Image.Image]]:
        frames = app.interpolate(*numbers)
        path = folder / ("-".join(map(str, numbers)) + ".gif")
        there_and_back = [*frames, *frames[-2:0:-1]]
        save_animation(path, np.stack([np.asarray(to_mode(frame, 3)) for frame in there_and_back]))
        return str(path), frames

    with gradio.Row():
        seed = gradio.Number(0, label="Seed", precision=0)
        start, end = gradio.Number(0, label="From", precision=0), gradio.Number(1, label="To", precision=0)
        frames = gradio.Slider(2, _MOST, 16, step=1, label="Pictures")
        steps, resolution = _drawing(app)
    button = gradio.Button("Go", variant="primary")
    with gradio.Row():
        film = gradio.Image(label="There and back", type="filepath", height=300)
        gallery = gradio.Gallery(label="Every step", columns=4, object_fit="contain", format="png")
    inputs = [seed, start, end, frames, steps, resolution]
    button.click(_told(animate), inputs, [film, gallery], api_name="interpolate")


def _encode_tab(app: DemoApp) -> None:
    import gradio

    with gradio.Row():
        picture = gradio.Image(label="Your picture", type="pil", image_mode=None, height=300)
        refinement = gradio.Slider(0, 500, 60, step=10, label="Steps of refinement")
    button = gradio.Button("Find its latent", variant="primary")
    gallery = gradio.Gallery(label="What the latent draws", columns=4, object_fit="contain", format="png")
    words = gradio.Markdown()
    button.click(_told(app.encode), [picture, refinement], [gallery, words], api_name="encode")


def _drawing(app: DemoApp) -> tuple[Any, Any]:
    """Makes the sliders of denoising steps and of the resolution, which pictures alone have: above the data's."""
    import gradio

    longest = max(as_axes(app.signal.grid_resolution, app.signal.dimensions))
    steps = gradio.Slider(1, 100, INFERENCE_STEPS, step=1, label="Denoising steps")
    resolution = gradio.Slider(8, 512, min(4 * longest, 256), step=8, label="Pixels", visible=app.takes_pictures)
    return steps, resolution


def _told(work: Any) -> Any:
    """Shows a user's mistake as a line on the page."""
    import gradio

    def told(*inputs: Any) -> Any:
        try:
            return work(*inputs)
        except UserError as error:
            raise gradio.Error(str(error)) from None

    return told
