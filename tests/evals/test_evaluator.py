"""The registry of evaluators: one's own joins, and what has none is refused."""

from pathlib import Path
from typing import Any

import pytest

import evals.evaluator
from evals.arguments import EvalArguments
from evals.evaluator import Evaluator, evaluator_of, register_evaluator
from evals.images import ImageEvaluator
from mnif.utils.errors import UserError
from mnif.utils.process import Processes


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EvalArguments:
    """Samples against a reference of a signal that nothing here measures."""
    monkeypatch.setattr(evals.evaluator, "_REGISTERED", {})
    monkeypatch.setattr(evals.evaluator, "detect_signal", lambda source: "audio")
    return EvalArguments(samples="drawn", reference="songs", output_dir=tmp_path)


def test_a_signal_without_an_evaluator_is_refused(arguments: EvalArguments) -> None:
    message = "--reference songs is of the signal audio; `mnif eval` measures image, voxels, radiance"
    with pytest.raises(UserError, match=message):
        evaluator_of(arguments)


def test_an_evaluator_of_ones_own_joins_by_its_signal(arguments: EvalArguments) -> None:
    @register_evaluator
    class AudioEvaluator(Evaluator):
        signal = "audio"

        def inputs(self) -> dict[str, str]:
            return {"measured": "songs"}

        def evaluate(self, processes: Processes) -> dict[str, Any]:
            return {"loudness": 1.0}

    evaluator = evaluator_of(arguments)
    assert isinstance(evaluator, AudioEvaluator)
    assert evaluator.arguments is arguments


def test_pictures_against_pictures_are_measured_as_such(picture_folder: Path, tmp_path: Path) -> None:
    arguments = EvalArguments(samples=f"{picture_folder}", reference=f"{picture_folder}", output_dir=tmp_path)
    evaluator = evaluator_of(arguments)
    assert isinstance(evaluator, ImageEvaluator)
    inputs = evaluator.inputs()
    assert inputs.keys() == {"measured", "reference_fingerprint"}
    assert not list(tmp_path.glob("*.json"))
