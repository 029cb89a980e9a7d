"""Damaged and hostile model folders: configurations, index, schedulers, weights, and code that lies beside them."""

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from latent_prior.pipeline import MNIFPipeline, load_pipeline
from mnif.cli import main
from mnif.models.io import check_component
from mnif.models.mnif_model import MNIFModel
from mnif.signals.registry import signal_of_model
from tests.hostile.conftest import refusal_of
from tests.hostile.mutators import damaged_bytes, damaged_json

FILES = {
    "model_index.json": 60,
    "decoder/config.json": 60,
    "denoiser/config.json": 40,
    "student/config.json": 20,
    "scheduler/scheduler_config.json": 60,
    "student_scheduler/scheduler_config.json": 20,
}


def drawn(model: Path) -> torch.Tensor:
    """One sample of a model folder, which must be finite whatever the folder says."""
    pipeline = load_pipeline(model)
    signal_of_model(pipeline.decoder)
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(1, torch.Generator().manual_seed(0), num_inference_steps=2, output_type="latent").images
    assert latents.isfinite().all()
    return latents


@pytest.mark.parametrize(("name", "seed"), [(name, seed) for name, count in FILES.items() for seed in range(count)])
def test_json_of_a_model(name: str, seed: int, copied: Callable[[str], Path], made: Path) -> None:
    model = copied("model")
    (model / name).write_bytes(damaged_json((model / name).read_bytes(), seed))
    refusal = refusal_of(lambda: drawn(model))
    if refusal is None:  # what is accepted means what it says
        content = json.loads((model / name).read_bytes())
        if name.endswith("/config.json"):
            component = getattr(load_pipeline(model), name.split("/")[0])
            assert {key: component.config[key] for key in content if not key.startswith("_")} == {
                key: value for key, value in content.items() if not key.startswith("_")
            }


@pytest.mark.parametrize("part", ["decoder", "denoiser"])
@pytest.mark.parametrize("seed", range(40))
def test_weights(part: str, seed: int, copied: Callable[[str], Path]) -> None:
    model = copied("model")
    path = model / part / "diffusion_pytorch_model.safetensors"
    path.write_bytes(damaged_bytes(path.read_bytes(), seed))
    refusal_of(lambda: drawn(model))


def changed(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    ("file", "entries", "words"),
    [
        ("denoiser/config.json", {"width": 9000}, r"\[9000\]"),
        ("denoiser/config.json", {"width": 24_000_000}, "width: .*<= 1048576"),
        ("denoiser/config.json", {"depth": 10**6}, "depth: .*<= 256"),
        ("denoiser/config.json", {"depth": 3}, "blocks.2.*missing"),
        ("decoder/config.json", {"num_bases": 60000}, "where config.json makes it"),
        ("decoder/config.json", {"resolution": 10**6}, "at most"),
        ("decoder/config.json", {"cells": 10**5}, "at most"),
        ("decoder/config.json", {"channels": -1}, "channels: .*>= 1"),
        ("decoder/config.json", {"signal": "../x"}, "was trained for decoder"),
        ("decoder/config.json", {"quantization_config": {"load_in_8bit": True}}, "quantization_config"),
        ("decoder/config.json", {"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ("decoder/config.json", {"width": "8"}, "width: Expected `int`"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "num_train_timesteps"),
        ("scheduler/scheduler_config.json", {"solver_order": 10**6}, "solver_order: .*<= 3"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, "does not fit"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}, "its betas are others"),
        ("scheduler/scheduler_config.json", {"thresholding": True}, "thresholding"),
        ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "does not fit"),
        ("scheduler/scheduler_config.json", {"_class_name": "EulerDiscreteScheduler"}, "takes no|scales its samples"),
        ("scheduler/scheduler_config.json", {"_class_name": "os"}, "os is no scheduler"),
        ("scheduler/scheduler_config.json", {"_class_name": "ModelMixin"}, "ModelMixin is no scheduler"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMInverseScheduler"}, "is no scheduler"),
        ("model_index.json", {"decoder": ["os", "system"]}, r"decoder\[0\]: Invalid enum value 'os'"),
        ("model_index.json", {"decoder": ["diffusers", "UNet2DModel"]}, r"decoder\[0\].*'diffusers'"),
        ("model_index.json", {"denoiser": ["latent_prior.denoisers", "Denoiser"]}, r"denoiser\[1\].*'Denoiser'"),
        ("model_index.json", {"scheduler": ["subprocess", "Popen"]}, r"scheduler\[0\].*'subprocess'"),
        ("model_index.json", {"safety_checker": ["transformers", "X"]}, "safety_checker"),
        ("model_index.json", {"_class_name": ["evil", "Pipeline"]}, "_class_name"),
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "'StableDiffusionPipeline'"),
        ("model_index.json", {"quantization_config": {}}, "quantization_config"),
    ],
)
def test_what_asks_for_too_much_is_refused_by_name(
    file: str, entries: dict[str, Any], words: str, copied: Callable[[str], Path]
) -> None:
    model = copied("model")
    changed(model / file, **entries)
    with pytest.raises(Exception, match=words) as error:
        drawn(model)
    assert type(error.value).__name__ == "UserError"
    with pytest.raises(Exception, match=words) as error:
        MNIFPipeline.from_pretrained(model)
    assert type(error.value).__name__ == "UserError"


@pytest.mark.parametrize(
    "name", ["EulerDiscreteScheduler", "PNDMScheduler", "KarrasVeScheduler", "ScoreSdeVeScheduler"]
)
def test_index_takes_the_schedulers_that_the_flag_takes(name: str, copied: Callable[[str], Path]) -> None:
    model = copied("model")
    changed(model / "scheduler/scheduler_config.json", _class_name=name)
    changed(model / "model_index.json", scheduler=["diffusers", name])
    assert refusal_of(lambda: drawn(model))


def test_loading_leaves_random_numbers_alone(made: Path) -> None:
    before = torch.get_rng_state()
    check_component(MNIFModel, made / "model/decoder")
    MNIFPipeline.from_pretrained(made / "model")
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_that_are_not_finite_or_integers_are_refused(copied: Callable[[str], Path]) -> None:
    path = copied("model") / "denoiser/diffusion_pytorch_model.safetensors"
    for change in (lambda values: values.fill_(float("nan")), lambda values: values.int()):
        weights = load_file(path)
        weights["read.weight"] = change(weights["read.weight"])
        save_file(weights, path, {"format": "pt"})
        assert "read.weight" in (refusal_of(lambda: drawn(path.parents[1])) or "")


def test_code_and_pickles_beside_weights_are_never_looked_at(
    copied: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copied("model")
    whole = drawn(model)
    bomb = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    for folder in (model, *(each for each in model.iterdir() if each.is_dir())):
        for name in (
            "None",
            "pipeline",
            "decoder",
            "MNIFPipeline",
            "mnif.models.mnif_model",
            "latent_prior.denoisers",
        ):
            (folder / f"{name}.py").write_text(bomb)
        (folder / "__init__.py").write_text(bomb)
        for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "scheduler.pkl"):
            (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    assert torch.equal(drawn(model), whole)
    MNIFPipeline.from_pretrained(model)
    assert not (tmp_path / "ran").exists()
    assert not [name for name in sys.modules if str(getattr(sys.modules[name], "__file__", "")).startswith(str(model))]
    (model / "decoder/diffusion_pytorch_model.safetensors").unlink()
    assert "has no diffusion_pytorch_model.safetensors" in (refusal_of(lambda: drawn(model)) or "")
    assert not (tmp_path / "ran").exists()


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_scheduler_that_does_not_say_whether_it_clips_is_refused(copied: Callable[[str], Path]) -> None:
    path = copied("model") / "student_scheduler/scheduler_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in content.items() if name != "clip_sample"}))
    assert "it clips samples" in (refusal_of(lambda: drawn(path.parents[1])) or "")


@pytest.mark.parametrize("gone", ["model_index.json", "scheduler", "decoder", "denoiser/config.json", "student"])
def test_damaged_local_folders_never_ask_the_network(
    gone: str, copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*arguments: object, **options: object) -> None:
        raise AssertionError("the network was asked")

    model = copied("model")
    shutil.rmtree(model / gone) if (model / gone).is_dir() else (model / gone).unlink()
    monkeypatch.setattr(HfApi, "repo_info", asked)
    monkeypatch.setattr("socket.socket.connect", asked)
    for load in (lambda: drawn(model), lambda: MNIFPipeline.from_pretrained(model)):
        assert str(model) in (refusal_of(load) or "")


def test_missing_folder_is_named_before_the_hub_is_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sample", "--model", "nosuch/model", "--output_dir", "out"]) == 2
    assert capsys.readouterr().out.startswith("nosuch/model: no such folder")
    assert not (tmp_path / "out").exists()
