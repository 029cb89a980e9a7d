"""The server of examples/rest_server.py over a real bundle: what it draws, and what it refuses in which words."""

import asyncio
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from export.device.bundle import BundleError
from export.device.pictures import to_uint8
from export.device.runtime import Sampler, load_bundle

pytest.importorskip("fastapi", reason="fastapi is not installed")

from fastapi.testclient import TestClient

FILE = Path(__file__).parents[2] / "examples/rest_server.py"


@pytest.fixture(scope="module")
def server() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rest_server", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def client(server: ModuleType, exported: Path) -> Iterator[TestClient]:
    with TestClient(server.create_app(exported)) as client:
        yield client


def test_pictures_are_those_of_the_bundle(client: TestClient, exported: Path) -> None:
    answer = client.get("/samples/5", params={"seed": 3, "steps": 3, "precision": "fp32"})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    with Image.open(io.BytesIO(answer.content)) as image:
        found = np.asarray(image).astype(int)
    (values,) = Sampler(load_bundle(exported), "fp32", 3)(1, seed=3, start=5)
    assert found.shape == (15, 15, 3)
    assert np.abs(found - to_uint8(values)).max() <= 1


def test_values_of_a_batch_are_those_of_single_samples(client: TestClient) -> None:
    answer = client.get("/samples", params={"count": 4, "start": 10})
    values = np.load(io.BytesIO(answer.content))
    assert (values.shape, values.dtype) == ((4, 15, 15, 3), np.float32)
    alone = np.load(io.BytesIO(client.get("/samples", params={"start": 12}).content))
    np.testing.assert_allclose(values[2:3], alone, atol=1e-5)


def test_facts_tell_what_can_be_asked(client: TestClient) -> None:
    facts = client.get("/").json()
    assert facts["resolution"] == [15, 15]
    assert {(each["steps"], each["precision"]) for each in facts["samplers"]} == {
        (steps, precision) for steps in (1, 3) for precision in ("fp32", "mixed")
    }
    assert facts["largest_batch"] == 32
    assert "/samples/{number}" in client.get("/openapi.json").json()["paths"]


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/samples?count=33", 422, "less than or equal to 32"),
        ("/samples?count=0", 422, "greater than or equal to 1"),
        ("/samples/-1", 422, "greater than or equal to 0"),
        ("/samples/x", 422, "valid integer"),
        ("/samples/1?seed=-1", 422, "greater than or equal to 0"),
        ("/samples/1?seed=9223372036854775808", 422, "less than 9223372036854775808"),
        ("/samples/1?precision=int4", 422, "'fp32' or 'mixed'"),
        ("/samples/1?steps=2", 404, "no graph of kind sampler, steps 2; there are sampler_1"),
        ("/samples/1?steps=0", 422, "greater than or equal to 1"),
        ("/pictures", 404, "Not Found"),
    ],
)
def test_what_cannot_be_drawn_is_said(client: TestClient, path: str, status: int, words: str) -> None:
    answer = client.get(path)
    assert answer.status_code == status
    detail = answer.json()["detail"]
    assert words in (detail if isinstance(detail, str) else detail[0]["msg"])
    assert "/tmp" not in answer.text  # no folder of the machine


def test_more_than_may_wait_are_sent_away(server: ModuleType, exported: Path) -> None:
    async def crowd() -> list[object]:
        pictures = server.Pictures(exported)
        sampler = pictures.sampler(None, 1)
        calls = [pictures.draw(sampler, 1, 0, index) for index in range(server.WAITING + 3)]
        return await asyncio.gather(*calls, return_exceptions=True)

    answers = asyncio.run(crowd())
    refused = [each for each in answers if isinstance(each, server.HTTPException)]
    assert [each.status_code for each in refused] == [503] * 3
    assert len([each for each in answers if isinstance(each, np.ndarray)]) == server.WAITING


def test_a_folder_that_is_no_bundle_stops_the_start(server: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="mnif export"), TestClient(server.create_app(tmp_path)):
        pass
