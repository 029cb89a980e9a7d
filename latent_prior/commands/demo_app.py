"""`mnif demo-app`: serves a local page to try a model on."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from mnif.utils.args import parse_arguments
from mnif.utils.devices import DeviceFlags, chosen_device
from mnif.utils.errors import UserError, require


@dataclass(kw_only=True)
class DemoAppArguments(DeviceFlags):
    """Serve a local page to try a model on: samples, the way between two of them, a picture of your own."""

    model: Path
    """The model folder, RUN/model, a model on the hub, user/name, or avatars, which comes along."""
    host: str = "127.0.0.1"
    """The address to listen at; 0.0.0.0 lets others in."""
    port: int = 7860
    """The port to listen at."""
    atlas: Path | None = None
    """A page of `mnif atlas` to link to; default: atlas.html in the folder around the model, if it is there."""


def main(arguments: list[str]) -> None:
    """Runs `mnif demo-app` until it is stopped."""
    options = parse_arguments(DemoAppArguments, arguments, "mnif demo-app")
    require("gradio", "app", "a local page")
    if not 1 <= options.port <= 65535:
        raise UserError(f"--port {options.port}: must lie between 1 and 65535")

    if options.atlas is not None and not options.atlas.is_file():
        raise UserError(f"--atlas {options.atlas}: no such file; `mnif atlas` writes one")

    from latent_prior.demo_app import DemoApp, launch
    from latent_prior.hub import model_folder

    device = chosen_device(options.device)
    model = model_folder(options.model)
    atlas = options.atlas or model.parent / "atlas.html"
    app = DemoApp(model, device)
    with tempfile.TemporaryDirectory(prefix="mnif-demo-app-") as folder:
        launch(app, Path(folder), options.host, options.port, atlas=atlas if atlas.is_file() else None)
