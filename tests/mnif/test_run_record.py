from pathlib import Path

import pytest

from mnif.training.arguments import TrainingArguments
from mnif.training.run_record import begin_stage, finish_stage
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
