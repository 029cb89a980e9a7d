"""Models on the hub: fetched, pushed, and described by a card; nothing here asks the network."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects

from latent_prior import hub
from latent_prior.hub import repository_for
from latent_prior.model_card import Figure, add_evaluation, write_model_card
from latent_prior.pipeline import MNIFPipeline, load_pipeline
from latent_prior.settings import HubFlags
from mnif.cli import main
from mnif.latents.table import LatentTable
from mnif.utils.args import parse_arguments
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
    assert card.data.eval_results is None
    assert card.data.datasets == "twemoji"
    load_pipeline(run / "model")


def test_card_shows_the_picture_of_samples(run: Path) -> None:
    write_model_card(run)
    assert "samples.png" not in (run / "model/README.md").read_text()
    (run / "samples").mkdir()
    (run / "samples/samples.png").write_bytes(b"a picture")
    write_model_card(run)
    card = ModelCard.load(run / "model/README.md")
    assert card.data.widget[0]["output"]["url"] == "samples.png"
    assert "](samples.png)" in card.text
    assert (run / "model/samples.png").read_bytes() == b"a picture"


FIGURES = [
    Figure("fd_lite0", "fd_lite0 ↓", 12.5, 0.25),
    Figure("nn_ratio", "nn_ratio, 1 is as new as unseen data", 1.1),
]


def test_card_says_what_was_measured(run: Path) -> None:
    """As metadata that the hub reads, and as text in the place of "not measured yet"; measured again, once."""
    write_model_card(run)
    before = ModelCard.load(run / "model/README.md").text
    for words in ("| first |", "| second \\1 |\n\nMeasured."):
        assert add_evaluation(run / "model", FIGURES, "/home/ada/twemoji", words)
    card = ModelCard.load(run / "model/README.md")
    assert card.data.model_name == "emoji"
    rows = [(row.metric_type, row.metric_value, row.metric_args) for row in card.data.eval_results]
    assert rows == [("fd_lite0", 12.5, {"standard_error": 0.25}), ("nn_ratio", 1.1, None)]
    assert {row.dataset_name for row in card.data.eval_results} == {"twemoji"}
    assert card.data.to_dict()["model-index"][0]["results"][0]["task"]["type"] == "unconditional-image-generation"
    assert card.text.split("## Evaluation\n")[0] == before.split("## Evaluation\n")[0]
    assert card.text.split("## Licence")[1] == before.split("## Licence")[1]
    section = card.text.split("## Evaluation\n")[1].split("## Licence")[0]
    assert section == "\n| second \\1 |\n\nMeasured.\n\n"
    assert "ada" not in str(card)
    write_model_card(run)  # the model is another one now
    assert "not been measured yet" in (run / "model/README.md").read_text()


def test_evaluation_without_a_card_or_with_another(run: Path) -> None:
    card = run / "model/README.md"
    assert not add_evaluation(run / "model", FIGURES, "twemoji", "x")
    assert not card.exists()
    card.write_text("a card of somebody's own")
    assert add_evaluation(run / "model", FIGURES, "twemoji", "found")
    assert ModelCard.load(card).text.strip() == "a card of somebody's own\n\n## Evaluation\n\nfound"
    card.write_text("---\n: [\n---\n")
    with pytest.raises(UserError, match="no model card") as error:
        add_evaluation(run / "model", FIGURES, "twemoji", "x")
    assert "\n" not in str(error.value)


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
    card = ModelCard.load(run / "model/README.md")
    assert (card.data.license, card.data.datasets) == ("unknown", None)
    assert "the licence of the data, `my/pictures`," in " ".join(card.text.split())
    card.data.license = "cc0-1.0"  # by hand, and then another stage
    card.save(run / "model/README.md")
    write_model_card(run)
    card = ModelCard.load(run / "model/README.md")
    assert card.data.license == "cc0-1.0"
    assert "cc0-1.0, as the data, `my/pictures`, have it" in " ".join(card.text.split())


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


class FakeHub:
    """Stands for the hub: who is logged in, which repositories there are, and what was uploaded to them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, user: str | None = "me"):
        self.made: list[str] = []
        self.uploaded: dict[str, dict[str, bytes]] = {}
        hub_of_test = self

        class Answer:
            def __init__(self, repo_id: str):
                self.repo_id, self.commit_url = repo_id, f"https://huggingface.co/{repo_id}/commit/1"

        def whoami(api: HfApi) -> dict[str, str]:
            if user is None:
                raise LocalTokenNotFoundError("Token is required")
            return {"name": user}

        def create(api: HfApi, repo_id: str, **options: object) -> Answer:
            assert options.pop("exist_ok")
            repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
            if not repo_id.startswith(f"{user}/"):
                raise OSError("403 Forbidden\nin many lines")
            hub_of_test.made.append(repo_id)
            return Answer(repo_id)

        def upload(
            api: HfApi, repo_id: str, folder_path: Path, ignore_patterns: list[str], **options: object
        ) -> Answer:
            paths = [path for path in Path(folder_path).rglob("*") if path.is_file()]
            names = [path.relative_to(folder_path).as_posix() for path in paths]
            kept = filter_repo_objects(names, ignore_patterns=ignore_patterns)
            hub_of_test.uploaded[repo_id] = {name: (Path(folder_path) / name).read_bytes() for name in kept}
            return Answer(repo_id)

        monkeypatch.setattr(HfApi, "whoami", whoami)
        monkeypatch.setattr(HfApi, "create_repo", create)
        monkeypatch.setattr(HfApi, "upload_folder", upload)


def test_push_takes_all_along(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_model_card(run)
    (run / "model/.mnif.lock").write_text("held")
    fake = FakeHub(monkeypatch)
    pipeline = load_pipeline(run / "model")
    assert pipeline.push_to_hub("me/emoji").endswith("/commit/1")
    pushed = fake.uploaded["me/emoji"]
    assert b"psnr_heldout" in pushed["README.md"]
    assert {"model_index.json", "pipeline.py", "decoder/diffusion_pytorch_model.safetensors"} <= pushed.keys()
    assert not [name for name in pushed if Path(name).suffix in (".bin", ".pt", ".pkl")]
    assert str(tmp_path).encode() not in pushed["model_index.json"]
    pipeline.save_pretrained(tmp_path / "emoji-half", variant="fp16", push_to_hub=True)
    assert "decoder/diffusion_pytorch_model.fp16.safetensors" in fake.uploaded["me/emoji-half"]


def arguments(*flags: str) -> HubFlags:
    return parse_arguments(HubFlags, [*flags], "mnif prior")


def test_repository_is_found_before_the_work(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHub(monkeypatch)
    assert repository_for(arguments(), run / "model") is None
    assert not fake.made
    assert repository_for(arguments("--push_to_hub"), run / "model") == "me/emoji"
    assert repository_for(arguments("--push_to_hub", "--hub_model_id", "me/other"), run / "model") == "me/other"
    for flags, words in (
        (["--hub_model_id", "me/emoji"], "say --push_to_hub too"),
        (["--push_to_hub", "--hub_model_id", "a b"], "--hub_model_id a b: "),
        (["--push_to_hub", "--hub_model_id", "you/emoji"], "you/emoji cannot be written to .403 Forbidden"),
    ):
        with pytest.raises(UserError, match=words) as error:
            repository_for(arguments(*flags), run / "model")
        assert "\n" not in str(error.value)
    FakeHub(monkeypatch, user=None)
    with pytest.raises(UserError, match="nobody is logged in; run `hf auth login`"):
        repository_for(arguments("--push_to_hub"), run / "model")


def test_prior_and_distill_push(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({"fit": record["fit"] | {"finished": True}}))
    prior = ["prior", "--run", str(run), "--max_train_steps", "2", "--width", "32", "--depth", "2", "--push_to_hub"]
    FakeHub(monkeypatch, user=None)
    assert main(prior) == 2
    assert "nobody is logged in" in capsys.readouterr().err
    assert not (run / "checkpoints").exists()
    fake = FakeHub(monkeypatch)
    assert main(prior) == 0, capsys.readouterr().err
    first = fake.uploaded.pop("me/emoji")
    assert {"README.md", "samples.png", "pipeline.py", "denoiser/config.json"} <= first.keys()
    assert main([*prior, "--hub_model_id", "again"]) == 0  # finished before: what there is goes up
    assert fake.uploaded["me/again"].keys() == first.keys()
    distill = ["distill", "--run", str(run), "--num_pairs", "64", "--max_train_steps", "2", "--push_to_hub"]
    assert main([*distill, "--width", "16", "--depth", "1"]) == 0
    assert "student/config.json" in fake.uploaded["me/emoji"]
    assert b"mnif distill" in fake.uploaded["me/emoji"]["README.md"] or b"How it was made" in first["README.md"]


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
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(metrics | {"fd`x`": 3.0}))
    write_model_card(run)
    text = (run / "model/README.md").read_text()
    assert not any(private in text for private in ("ada", "secret", "/srv", "~", "\n# forged"))
    fences = [line for line in text.splitlines() if line.startswith("```")]
    assert fences == ["```python", "```", "```sh", "```"]
    assert r"mnif fit --data 'a\n```\n# forged `x`' --output_dir=emoji" in text
    assert r"```` a\n```\n# forged `x` ````: 7 instances to train" in text
    assert "- `` fd`x` ``: 3" in text
