"""Where commands compute: what --device says, what Accelerate was told, and training data that live on the device."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mnif.cli import main
from mnif.data.batches import array_dataset
from mnif.data.dataset import SelectedRows
from mnif.training import loop
from mnif.training.arguments import TrainingArguments
from mnif.training.loop import make_loader, placed
from mnif.utils import devices
from mnif.utils.devices import chosen_device, default_device, memory_of, sent
from mnif.utils.errors import UserError
from mnif.utils.process import Processes

ROWS = 37


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (ROWS, 5, 4, 3), dtype=np.uint8)


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two NVIDIA GPUs, as far as one asks PyTorch for them."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


@pytest.mark.parametrize(
    ("name", "found"), [(None, "cuda"), ("cuda", "cuda"), ("cuda:1", "cuda:1"), ("cpu", "cpu"), ("cpu:0", "cpu")]
)
def test_a_device_is_the_one_that_is_named(name: str | None, found: str, two_cards: None) -> None:
    assert chosen_device(name) == torch.device(found)


@pytest.mark.parametrize("name", ["cuda:2", "mps", "meta", "gpu", "", "cpu:1", "cuda:-1"])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(name: str, two_cards: None) -> None:
    with pytest.raises(UserError) as raised:
        chosen_device(name)
    assert str(raised.value) == (
        f"--device {name}: there is no such device here; take cpu or cuda:0 or cuda:1, or leave it out"
    )


@pytest.mark.parametrize(("told", "found"), [("true", "cpu"), ("1", "cpu"), ("false", "cuda"), ("", "cuda")])
def test_the_default_device_is_what_accelerate_was_told(
    told: str, found: str, two_cards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", told)  # as `accelerate launch --cpu` does
    assert default_device() == torch.device(found)
    assert chosen_device("cuda:1") == torch.device("cuda:1")


def test_of_several_processes_each_takes_a_device_of_its_own(
    two_cards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class State:
        process_index, num_processes, device = 1, 2, torch.device("cuda:1")

        def __init__(self, **options: Any) -> None:
            assert options["cpu"] is False

    monkeypatch.setattr("accelerate.PartialState", State)
    assert Processes("cuda").device == Processes().device == torch.device("cuda:1")
    with pytest.raises(UserError, match="--device cuda:0: one for 2 processes; take cuda, or leave it out"):
        Processes("cuda:0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_every_command_that_takes_a_device_refuses_one_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = ["--model", "avatars"], ["--data", f"{tmp_path}"]
    output = ["--output_dir", f"{tmp_path}/out"]
    for command in (
        ["encode", *model, *data, *output],
        ["decode", *model, "--latents", f"{tmp_path}/none", *output],
        ["sample", *model, *output],
        ["eval", *model, "--reference", f"{tmp_path}", *output],
        ["atlas", *model, *output],
        ["monitor", *model, *data, *output],
    ):
        assert main([*command, "--device", "cuda:3"]) == 2
        said = capsys.readouterr().err
        assert said == f"mnif {command[0]}: --device cuda:3: there is no such device here; take cpu, or leave it out\n"
        assert not (tmp_path / "out").exists()
