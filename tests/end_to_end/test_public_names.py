"""The names one imports from a package, and those that saved folders hold: both outlive a move of the code."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import export
import latent_prior
import mnif
from latent_prior.pipeline import MNIFPipeline
from mnif.models.io import save_component
from mnif.models.mnif_model import MNIFModel
from mnif.utils.errors import UserError

PUBLIC = {
    "mnif": ["BakedField", "LatentTable", "MNIFModel", "Signal", "__version__", "load_model", "register_signal"],
    "latent_prior": ["MNIFPipeline", "load_pipeline", "sample_latents"],
    "export": ["export_bundle", "load_bundle"],
}


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_are_these_and_there(package: str) -> None:
    module = import_module(package)
    assert module.__all__ == PUBLIC[package]
    assert all(getattr(module, name) is not None for name in module.__all__)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        _ = module.nothing


@pytest.mark.parametrize("module", [mnif, latent_prior, export], ids=lambda module: module.__name__)
def test_importing_a_package_imports_nothing_of_weight(module: object) -> None:
    program = (
        f"import sys, {module.__name__}; "  # type: ignore[attr-defined]
        "print(sorted({'torch', 'diffusers', 'numpy', 'onnx', 'tyro'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("package", [*PUBLIC, "evals"])
def test_packages_are_typed(package: str) -> None:
    file = import_module(package).__file__
    assert file is not None
    assert (Path(file).parent / "py.typed").is_file()


def test_load_model_gives_the_decoder_of_a_model_folder(decoder: MNIFModel, tmp_path: Path) -> None:
    save_component(tmp_path / "model", "decoder", decoder)
    loaded = mnif.load_model(str(tmp_path / "model"))
    assert loaded.fingerprint() == decoder.fingerprint()
    assert not loaded.training
    with pytest.raises(UserError, match="no such model folder"):
        mnif.load_model(tmp_path / "nowhere")


def test_saved_folders_name_these_modules(pipeline: MNIFPipeline, tmp_path: Path) -> None:
    """diffusers notes the module of a class; a move needs a line in the change log that says how to mend folders."""
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["decoder"] == ["mnif.models.mnif_model", "MNIFModel"]
    assert index["denoiser"] == ["latent_prior.denoisers", "ResMLPDenoiser"]
    assert index["scheduler"] == ["diffusers", "UniPCMultistepScheduler"]
    for component, name in (("decoder", "MNIFModel"), ("denoiser", "ResMLPDenoiser")):
        assert json.loads((tmp_path / component / "config.json").read_text())["_class_name"] == name
    denoisers = import_module("latent_prior.denoisers")
    for kind in (denoisers.PaperDenoiser, denoisers.TransformerDenoiser):
        assert kind.__module__ == "latent_prior.denoisers"


def test_line_of_the_change_log_mends_an_older_folder(pipeline: MNIFPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    now = {file: file.read_text() for file in (tmp_path / "model_index.json", *tmp_path.glob("*/config.json"))}
    for file, text in now.items():
        text = text.replace("mnif.models.mnif_model", "mnif.modeling")
        text = text.replace("latent_prior.denoisers", "latent_prior.denoiser")
        file.write_text(text.replace("ResMLPDenoiser", "LatentDenoiser"))
    changes = (Path(mnif.__file__).parents[1] / "CHANGELOG.md").read_text()
    (line,) = (each.strip() for each in changes.splitlines() if each.strip().startswith("sed -i "))
    subprocess.run(line, shell=True, check=True, cwd=tmp_path)
    assert {file: file.read_text() for file in now} == now
