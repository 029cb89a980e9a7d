"""The local app: what it does with a model, and the same over HTTP where gradio is installed."""

import socket
from importlib.util import find_spec
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from PIL import Image

from latent_prior import demo_app
from latent_prior.demo_app import DemoApp
from latent_prior.pipeline import MNIFPipeline
from mnif.cli import main
from mnif.utils.errors import UserError


@pytest.fixture
def model(pipeline: MNIFPipeline, tmp_path: Path) -> Path:
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def app(model: Path) -> DemoApp:
    return DemoApp(model)


def test_samples_are_those_of_mnif_sample(app: DemoApp, model: Path, tmp_path: Path) -> None:
    command = ["sample", "--model", str(model), "--output_dir", str(tmp_path / "samples"), "--num_samples", "5"]
    assert main([*command, "--seed", "3", "--num_inference_steps", "2", "--resolution", "24", "--grid", "0"]) == 0
    drawn = app.sample(3, 2, 3, 2, 24, 1.0)
    assert [label for _, label in drawn] == [f"sample {number}" for number in (2, 3, 4)]
    for number, (picture, _) in enumerate(drawn, 2):
        with Image.open(tmp_path / f"samples/{number:06d}.png") as file:
            np.testing.assert_array_equal(np.asarray(picture), np.asarray(file))


def test_ways_begin_and_end_with_their_samples(app: DemoApp) -> None:
    frames = app.interpolate(0, 1, 4, 5, 2, 16)
    ends = [app.sample(0, number, 1, 2, 16, 1.0)[0][0] for number in (1, 4)]
    assert len(frames) == 5
    for frame, end in zip((frames[0], frames[-1]), ends, strict=True):
        assert np.abs(np.asarray(frame, dtype=int) - np.asarray(end, dtype=int)).max() <= 1


def test_a_picture_of_the_model_comes_back(app: DemoApp) -> None:
    ((picture, _),) = app.sample(0, 0, 1, 2, 16, 1.0)
    pictures, words = app.encode(picture, 60)
    assert [image.size for image, _ in pictures] == [(16, 16), (32, 32), (64, 64), (256, 256)]
    np.testing.assert_array_equal(np.asarray(pictures[0][0]), np.asarray(picture))
    assert float(words.split(" dB")[0]) > 25
    assert words.endswith("12 numbers stand for 768.")


def test_mistakes_are_told_in_one_line(app: DemoApp) -> None:
    for arguments, words in (
        ((-1, 0, 1, 2, 16, 1.0), "seed -1"),
        ((0, 0, 65, 2, 16, 1.0), "at most 64"),
        ((0, 0, 1, 2, 16, 1.5), "truncation 1.5"),
        ((0, 0, 1, 0, 16, 1.0), "steps 0"),
    ):
        with pytest.raises(UserError, match=words):
            app.sample(*arguments)
    with pytest.raises(UserError, match="give a picture first"):
        app.encode(None, 10)


def test_without_gradio_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mnif.utils.errors.find_spec", lambda name: None)
    assert main(["demo-app", "--model", str(tmp_path / "nothing")]) == 2
    expected = 'mnif demo-app: a local page: the package "gradio" is missing; run: pip install "mnif-diffusion[app]"\n'
    assert capsys.readouterr().err == expected


def test_an_atlas_that_is_not_there_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("latent_prior.commands.demo_app.require", lambda *_: None)
    assert main(["demo-app", "--model", "nowhere", "--atlas", str(tmp_path / "atlas.html")]) == 2
    expected = f"mnif demo-app: --atlas {tmp_path / 'atlas.html'}: no such file; `mnif atlas` writes one\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("beside", [True, False])
def test_an_atlas_beside_the_model_is_found(model: Path, beside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[object] = []
    monkeypatch.setattr("latent_prior.commands.demo_app.require", lambda *_: None)
    monkeypatch.setattr(demo_app, "launch", lambda *_, atlas: served.append(atlas))
    page = model.parent / "atlas.html"
    if beside:
        page.write_text("an atlas")
    assert main(["demo-app", "--model", str(model)]) == 0
    assert served == [page if beside else None]


@pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed; it wants an older Pillow")
@pytest.mark.filterwarnings("default")
def test_the_page_answers_over_http(app: DemoApp, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "atlas.html").write_text("<!doctype html>an atlas")
    page = demo_app.launch(app, tmp_path, "127.0.0.1", port, block=False, atlas=tmp_path / "atlas.html")
    try:
        with urlopen(f"http://127.0.0.1:{port}/atlas") as answer:
            assert answer.headers.get_content_type() == "text/html"
            assert "Content-Disposition" not in answer.headers
            assert answer.read() == b"<!doctype html>an atlas"
        with urlopen(f"http://127.0.0.1:{port}/") as answer:
            assert b"(/atlas)" in answer.read()
        from gradio_client import Client, handle_file

        client = Client(f"http://127.0.0.1:{port}", verbose=False, download_files=str(tmp_path / "got"))
        gallery = client.predict(0, 0, 2, 2, 24, 1.0, api_name="/sample")
        expected = app.sample(0, 0, 2, 2, 24, 1.0)
        for found, (picture, label) in zip(gallery, expected, strict=True):
            assert found["caption"] == label
            with Image.open(found["image"]) as image:
                np.testing.assert_array_equal(np.asarray(image.convert("RGB")), np.asarray(picture))
        film, frames = client.predict(0, 0, 1, 4, 2, 16, api_name="/interpolate")
        assert len(frames) == 4
        with Image.open(film) as image:
            assert image.n_frames == 6
        expected[0][0].save(tmp_path / "mine.png")
        pictures, words = client.predict(handle_file(tmp_path / "mine.png"), 10, api_name="/encode")
        assert len(pictures) == 4
        assert " dB at 16 × 16" in words
        with pytest.raises(Exception, match="seed -1"):
            client.predict(-1, 0, 2, 2, 24, 1.0, api_name="/sample")
    finally:
        page.close()
        torch.set_grad_enabled(True)
