"""Models on the hub: fetched, pushed, and described by a card; nothing here asks the network."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard

from latent_prior import hub
from latent_prior.hub import write_model_card
from latent_prior.pipeline import MNIFPipeline, load_pipeline
from mnif.latents.table import LatentTable
from mnif.utils.errors import UserError

# What `snapshot_download` finds in its cache folder: a branch, and the commit it stands at.
_COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def run(pipeline: MNIFPipeline, tmp_path: Path) -> Path:
    """A run folder as the commands leave it."""
    folder = tmp_path / "emoji"
    pipeline.save_pretrained(folder / "model")
    held_out = torch.arange(10) < 3
    ids = [str(index) for index in range(10)]
    table = LatentTable(torch.randn(10, 12), ids, held_out, pipeline.decoder.fingerprint(), "twemoji")
    table.save(folder / "latents.safetensors")
    stages = {"fit": "mnif fit --data twemoji", "prior": "mnif prior --run emoji"}
    record = {name: {"command": command, "inputs": {"data_fingerprint": "abc"}} for name, command in stages.items()}
    (folder / "run.json").write_text(json.dumps(record))
    metrics = {"psnr_heldout": 26.2356, "decoder_parameters": 718179, "prior": {"seconds": 378.9}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def test_card_is_filled_from_the_run(run: Path) -> None:
    write_model_card(run)
    card = ModelCard.load(run / "model/README.md")
    assert card.data.license == "cc-by-4.0"
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    text = " ".join(card.text.split())
    for words in (
        "`twemoji`: 7 instances to train, 3 held out",
        "mnif fit --data twemoji mnif prior --run emoji",
        "`psnr_heldout`: 26.24",
        "`decoder_parameters`: 718,179",
        "`prior.seconds`: 378.9",
        "not been measured yet",
        "CC-BY 4.0",
    ):
        assert words in text
    (run / "eval").mkdir()
    evaluated = {"fd_lite0": 12.5, "protocol": {"samples": 1000}, "command": "mnif eval", "inputs": {"seed": "0"}}
    (run / "eval/metrics.json").write_text(json.dumps(evaluated))
    write_model_card(run)
    text = (run / "model/README.md").read_text()
    assert "Measured by `mnif eval` (samples 1000):" in text
    assert "- `fd_lite0`: 12.5" in text
    load_pipeline(run / "model")


def test_card_names_the_licence_of_the_style(run: Path) -> None:
    pytest.importorskip("dicebear")
    table = LatentTable.load(run / "latents.safetensors")
    table.data = "avatars:personas:500"
    table.save(run / "latents.safetensors")
    write_model_card(run)
    card = ModelCard.load(run / "model/README.md")
    assert card.data.license == "cc-by-4.0"
    assert "Personas by Draftbit by Draftbit - draftbit.com, CC BY 4.0" in card.text


def test_card_states_no_licence_for_data_it_does_not_know(run: Path) -> None:
    table = LatentTable.load(run / "latents.safetensors")
    table.data = "my/pictures"
    table.save(run / "latents.safetensors")
    write_model_card(run)
    card = ModelCard.load(run / "model/README.md", ignore_metadata_errors=True)
    assert card.data.license is None
    assert "the licence of the data, `my/pictures`," in " ".join(card.text.split())


def test_hub_ids_are_folders_too(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, from the cache that an earlier download left."""
    repository = tmp_path / "cache/models--me--emoji"
    shutil.copytree(run / "model", repository / "snapshots" / _COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(_COMMIT)
    pipeline = MNIFPipeline.from_pretrained("me/emoji", cache_dir=tmp_path / "cache")
    expected = load_pipeline(run / "model")
    noise = torch.randn(1, 12)
    for drawing in (pipeline, expected):
        drawing.set_progress_bar_config(disable=True)
    latents = [drawing(latents=noise, output_type="latent").images for drawing in (pipeline, expected)]
    assert torch.equal(*latents)


def test_hub_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: HfApi, repo_id: str, **options: object) -> None:
        raise OSError("connection refused\nby somebody")

    for offline in (True, False):
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(HfApi, "repo_info", refuse)
        with pytest.raises(UserError, match="me/nothing: no such folder, and the hub cannot be reached") as error:
            MNIFPipeline.from_pretrained("me/nothing", cache_dir=tmp_path)
        assert "\n" not in str(error.value)
        assert ("connection refused" in str(error.value)) is not offline


def test_paths_are_not_taken_for_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert hub.model_folder("runs/model") == Path("runs/model")
    assert hub.model_folder(tmp_path / "a/b") == tmp_path / "a/b"
    with pytest.raises(UserError, match="hub cannot be reached"):
        hub.model_folder("me/model")


def test_push_takes_weights_and_card_along(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = {}

    class Answer:
        repo_id = "me/emoji"
        commit_url = "https://huggingface.co/me/emoji/commit/1"

    def create(self: HfApi, repo_id: str, **options: object) -> Answer:
        return Answer()

    def upload(self: HfApi, repo_id: str, folder_path: str, **options: object) -> Answer:
        for path in Path(folder_path).rglob("*.*"):
            pushed[path.relative_to(folder_path).as_posix()] = path.read_bytes()
        return Answer()

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert load_pipeline(run / "model").push_to_hub("me/emoji").endswith("/commit/1")
    assert b"psnr_heldout" in pushed["README.md"]
    assert {"model_index.json", "decoder/diffusion_pytorch_model.safetensors"} <= pushed.keys()
    assert not [name for name in pushed if Path(name).suffix in (".bin", ".pt", ".py", ".pkl")]


def test_push_without_the_network_is_one_line(run: Path) -> None:
    with pytest.raises(UserError, match="me/emoji: not uploaded") as error:
        load_pipeline(run / "model").push_to_hub("me/emoji")
    assert "\n" not in str(error.value)


def test_card_keeps_its_fences_and_no_folder_of_the_machine(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    data = "/home/ada/secret/a\n```\n# forged `x`"
    record["fit"]["command"] = shlex.join(["mnif", "fit", "--data", data, "--output_dir=/srv/runs/emoji"])
    (run / "run.json").write_text(json.dumps(record))
    table = LatentTable.load(run / "latents.safetensors")
    table.data = data
    table.save(run / "latents.safetensors")
    (run / "eval").mkdir()
    evaluation = {"command": "mnif eval --model ~/runs/emoji/model", "fd`x`": 3.0, "protocol": {"a\nb": "c"}}
    (run / "eval/metrics.json").write_text(json.dumps(evaluation))
    write_model_card(run)
    text = (run / "model/README.md").read_text()
    assert not any(private in text for private in ("ada", "secret", "/srv", "~", "\n# forged"))
    fences = [line for line in text.splitlines() if line.startswith("```")]
    assert fences == ["```python", "```", "```sh", "```"]
    assert r"mnif fit --data 'a\n```\n# forged `x`' --output_dir=emoji" in text
    assert r"```` a\n```\n# forged `x` ````: 7 instances to train" in text
    assert r"Measured by `mnif eval --model model` (a\nb c):" in text
    assert "- `` fd`x` ``: 3" in text
