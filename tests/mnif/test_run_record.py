import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from mnif.training.arguments import TrainingArguments
from mnif.training.run_record import begin_stage, check_finished, finish_stage
from mnif.utils.args import parse_arguments
from mnif.utils.errors import UserError


def test_stage_is_reused_only_for_the_same_arguments_and_inputs(tmp_path: Path) -> None:
    arguments = TrainingArguments(seed=1)
    assert not begin_stage(tmp_path, "fit", arguments, {"data": "a"})
    assert not begin_stage(tmp_path, "fit", arguments, {"data": "a"})  # begun but not finished: continue
    finish_stage(tmp_path, "fit")
    assert begin_stage(tmp_path, "fit", arguments, {"data": "a"})
    assert begin_stage(tmp_path, "fit", TrainingArguments(seed=1, checkpointing_steps=5), {"data": "a"})
    with pytest.raises(UserError, match="with seed 1 where now it is 2"):
        begin_stage(tmp_path, "fit", TrainingArguments(seed=2), {"data": "a"})
    with pytest.raises(UserError, match=r"with data a where now it is b; .*--resume_from_checkpoint no"):
        begin_stage(tmp_path, "fit", arguments, {"data": "b"})
    assert not begin_stage(tmp_path, "fit", TrainingArguments(seed=2, resume_from_checkpoint="no"), {"data": "b"})
    assert not begin_stage(tmp_path, "prior", arguments, {})  # stages do not know of each other


@dataclass(kw_only=True)
class Arguments(TrainingArguments):
    """A command."""

    data: Path
    resolution: list[int] | None = None
    steps: tuple[int, ...] = (1, 2)
    center_views: bool = False


def test_what_is_recorded_is_of_its_kind_and_makes_the_same_run_again(tmp_path: Path) -> None:
    arguments = Arguments(data=Path("x"), resolution=[8, 9], center_views=True, mixed_precision="no")
    begin_stage(tmp_path, "fit", arguments, {})
    recorded = json.loads((tmp_path / "run.json").read_text())["fit"]["arguments"]
    assert recorded["center_views"] is True
    assert recorded["resolution"] == [8, 9]
    assert recorded["steps"] == [1, 2]
    assert (recorded["learning_rate"], recorded["seed"], recorded["data"]) == (1e-3, 0, "x")
    assert recorded["num_train_epochs"] is None
    assert parse_arguments(Arguments, ["--config", f"{tmp_path}/config.yaml"], "mnif fit") == arguments
    begin_stage(tmp_path, "prior", TrainingArguments(seed=3), {})
    assert parse_arguments(Arguments, ["--config", f"{tmp_path}/config.yaml"], "mnif fit") == arguments
    prior = parse_arguments(TrainingArguments, ["--config", f"{tmp_path}/config.yaml"], "mnif prior")
    assert prior == TrainingArguments(seed=3)


def test_records_of_older_versions_held_texts_and_fewer_flags(tmp_path: Path) -> None:
    arguments = Arguments(data=Path("x"), resolution=[8, 9], mixed_precision="no")
    begin_stage(tmp_path, "fit", arguments, {})
    finish_stage(tmp_path, "fit")
    record = json.loads((tmp_path / "run.json").read_text())
    texts = {"data": "x", "resolution": "[8, 9]", "steps": "(1, 2)", "center_views": "False", "seed": "0"}
    record["fit"]["arguments"] |= texts | {"learning_rate": "0.001", "mixed_precision": "no"}
    del record["fit"]["arguments"]["num_train_epochs"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert begin_stage(tmp_path, "fit", arguments, {})
    with pytest.raises(UserError, match="with center_views False where now it is True"):
        begin_stage(tmp_path, "fit", Arguments(data=Path("x"), resolution=[8, 9], center_views=True), {})


def test_only_a_constant_learning_rate_lets_a_run_be_made_longer(tmp_path: Path) -> None:
    for schedule, steps, longer, message in (
        ("constant", 200, 300, None),
        ("constant", 200, 100, "with max_train_steps 200 where now it is 100"),
        ("constant_with_warmup", 200, 300, None),
        ("constant_with_warmup", 50, 300, "only one with a constant learning rate can be made longer"),
        ("cosine", 200, 300, "of a run with --lr_scheduler cosine the steps before would have been others"),
    ):
        folder = tmp_path / f"{schedule}-{steps}-{longer}"
        folder.mkdir()
        begin_stage(folder, "fit", TrainingArguments(lr_scheduler=schedule, max_train_steps=steps), {})
        finish_stage(folder, "fit")
        again = TrainingArguments(lr_scheduler=schedule, max_train_steps=longer)
        if message is None:
            assert not begin_stage(folder, "fit", again, {})
            with pytest.raises(UserError, match="its `mnif fit` has not finished; continue it with: "):
                check_finished(folder, "fit")
        else:
            with pytest.raises(UserError, match=message):
                begin_stage(folder, "fit", again, {})
            check_finished(folder, "fit")


def test_names_that_are_no_utf8_can_be_recorded(tmp_path: Path) -> None:
    arguments = Arguments(data=Path("a\udcff\nb"), mixed_precision="no")
    for finished in (False, True):
        assert begin_stage(tmp_path, "fit", arguments, {}) is finished
        finish_stage(tmp_path, "fit")
    assert parse_arguments(Arguments, ["--config", f"{tmp_path}/config.yaml"], "mnif fit").data == Path("a\\udcff\nb")
