"""A bundle behind HTTP: pictures as PNG, values as numpy's .npy, with FastAPI.

pip install fastapi uvicorn
MNIF_BUNDLE=runs/demo/bundle uvicorn --app-dir examples rest_server:app
curl -o sample.png 'http://localhost:8000/samples/5?seed=0'
"""

import asyncio
import io
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi import Path as InPath
from PIL import Image

from export import load_bundle
from export.device.bundle import BundleError
from export.device.pictures import to_uint8
from export.device.runtime import Sampler

LARGEST_BATCH = 32  # samples in one answer

WAITING = 16  # requests that wait for their turn; more are sent away

Precision = Annotated[Literal["fp32", "mixed"] | None, Query(description="default: what is there, fp32 first")]
Steps = Annotated[int | None, Query(ge=1, description="evaluations of the denoiser; default: the most")]
Counted = Annotated[int, Query(ge=0, lt=2**63)]


class Pictures:
    """Draws from one bundle, one request at a time: a backend's threads are all in use anyway.

    Args:
        folder: of the bundle.

    Raises:
        BundleError: it is none, has no sampler, or is not of pictures.
    """

    def __init__(self, folder: Path):
        self._bundle = load_bundle(folder)
        if self._bundle.manifest["radiance"] is not None or self._bundle.manifest["grid"]["dimensions"] != 2:
            raise BundleError(f"{folder}: not a bundle of pictures")
        self._samplers: dict[tuple[str | None, int | None], Sampler] = {}
        self._turn, self._waiting = asyncio.Lock(), 0
        self.sampler(None, None)

    def sampler(self, precision: str | None, steps: int | None) -> Sampler:
        """Finds the sampler of a precision and a number of steps; None takes what is there, and the most steps."""
        if (precision, steps) not in self._samplers:
            self._samplers[precision, steps] = Sampler(self._bundle, precision, steps)
        return self._samplers[precision, steps]

    async def draw(self, sampler: Sampler, count: int, seed: int, start: int) -> np.ndarray:
        """Draws values [count, height, width, channels] when it is this request's turn.

        Raises:
            HTTPException: too many wait already (503).
        """
        if self._waiting >= WAITING:
            raise HTTPException(503, "too many requests are waiting; try again", headers={"Retry-After": "1"})
        self._waiting += 1
        try:
            async with self._turn:
                return await asyncio.to_thread(sampler, count, seed, start, LARGEST_BATCH)
        finally:
            self._waiting -= 1

    def facts(self) -> dict[str, Any]:
        """What a client must know to ask."""
        manifest = self._bundle.manifest
        graphs = {name: graph for name, graph in manifest["graphs"].items() if graph["kind"] == "sampler"}
        return {
            "decoder_fingerprint": manifest["decoder_fingerprint"],
            "resolution": manifest["grid"]["resolution"],
            "channels": manifest["values"]["channels"],
            "largest_batch": LARGEST_BATCH,
            "samplers": [
                {"steps": graph["steps"], "precision": graph["precision"], "psnr": graph["psnr"]}
                for graph in graphs.values()
            ],
        }


def create_app(folder: Path) -> FastAPI:
    """Makes the application for one bundle, which is opened when it starts."""

    @asynccontextmanager
    async def opened(app: FastAPI) -> AsyncIterator[None]:
        app.state.pictures = Pictures(folder)
        yield

    app = FastAPI(title="mnif", lifespan=opened)
    app.add_api_route("/", describe, methods=["GET"])
    app.add_api_route("/samples/{number}", draw_picture, methods=["GET"], response_class=Response)
    app.add_api_route("/samples", draw_values, methods=["GET"], response_class=Response)
    return app


def pictures_of(request: Request) -> Pictures:
    """Finds what the application has opened."""
    return request.app.state.pictures


Opened = Annotated[Pictures, Depends(pictures_of)]


async def describe(pictures: Opened) -> dict[str, Any]:
    """Tells sizes, limits, and the samplers with their decibels against float64."""
    return pictures.facts()


async def draw_picture(
    pictures: Opened,
    number: Annotated[int, InPath(ge=0, lt=2**63)],
    seed: Counted = 0,
    precision: Precision = None,
    steps: Steps = None,
) -> Response:
    """Draws sample ``number`` of ``seed`` as a PNG; it is the same whoever asks, and whatever is drawn beside it."""
    values = await pictures.draw(_chosen(pictures, precision, steps), 1, seed, number)
    content = io.BytesIO()
    Image.fromarray(np.squeeze(to_uint8(values[0]))).save(content, format="PNG")
    return Response(content.getvalue(), media_type="image/png", headers={"Cache-Control": "max-age=86400"})


async def draw_values(
    pictures: Opened,
    count: Annotated[int, Query(ge=1, le=LARGEST_BATCH)] = 1,
    start: Counted = 0,
    seed: Counted = 0,
    precision: Precision = None,
    steps: Steps = None,
) -> Response:
    """Draws values [count, height, width, channels] in about [-1, 1], float32, for numpy.load."""
    values = await pictures.draw(_chosen(pictures, precision, steps), count, seed, start)
    content = io.BytesIO()
    np.save(content, values)
    return Response(content.getvalue(), media_type="application/octet-stream")


def _chosen(pictures: Pictures, precision: str | None, steps: int | None) -> Sampler:
    try:
        return pictures.sampler(precision, steps)
    except BundleError as error:
        raise HTTPException(404, str(error).partition(": ")[2]) from None


app = create_app(Path(os.environ.get("MNIF_BUNDLE", "runs/demo/bundle")))
