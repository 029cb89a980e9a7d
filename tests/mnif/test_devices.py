"""Where commands compute: what --device says, what Accelerate was told, and training data that live on the device."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mnif.cli import main
from mnif.data.batches import ArrayDataset, array_dataset
from mnif.data.dataset import SelectedRows
from mnif.training import loader
from mnif.training.arguments import TrainingArguments
from mnif.training.loader import make_loader, placed
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


@pytest.mark.parametrize(("told", "found"), [("true", "cpu"), ("1", "cpu"), ("false", "cuda")])
def test_the_default_device_is_what_accelerate_was_told(
    told: str, found: str, two_cards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", told)  # as `accelerate launch --cpu` does
    assert default_device() == torch.device(found)
    assert chosen_device("cuda:1") == torch.device("cuda:1")


def test_of_several_processes_each_takes_a_device_of_its_own(two_cards: None, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_rows_are_the_same_on_a_device_as_in_memory(images: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    rows = array_dataset({"images": SelectedRows(mapped, np.arange(ROWS)[::-1])})
    there = rows.on("cpu")
    assert rows.nbytes() == images.nbytes + 8 * ROWS
    assert isinstance(there.arrays["images"], torch.Tensor)
    for few, many in ((rows, there), (rows.subset(np.array([5, 2, 30])), there.subset(np.array([5, 2, 30])))):
        for expected, found in zip(few.batches(8), many.batches(8), strict=True):
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_large_arrays_come_to_a_device_in_parts(images: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnif.data.batches._COPIED_BYTES", 4 * images[0].nbytes)
    seen = []
    monkeypatch.setattr("mnif.data.batches.sent", lambda tensor, device: seen.append(len(tensor)) or tensor)
    there = ArrayDataset(images=images).on("cpu")
    np.testing.assert_array_equal(there.arrays["images"], images)
    assert seen == [*[4] * 9, 1]


@pytest.mark.parametrize(
    ("wanted", "device", "memory", "is_there"),
    [
        ("auto", "cpu", 0, False),
        ("auto", "mps", 0, False),
        ("on", "cpu", 0, True),
        ("auto", "cuda", 4, True),
        ("auto", "cuda", 3.99, False),
        ("off", "cuda", 4, False),
        ("on", "cuda", 1, True),
    ],
)
def test_data_live_on_a_gpu_where_they_take_a_quarter_of_it_at_most(
    wanted: Any, device: str, memory: float, is_there: bool, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = array_dataset({"images": images})
    monkeypatch.setattr(loader, "memory_of", lambda device: memory * rows.nbytes() if device.type == "cuda" else 0)
    monkeypatch.setattr(type(rows), "on", lambda self, device: f"on {device}")
    found = placed(TrainingArguments(data_on_device=wanted), rows, torch.device(device))
    assert found == (f"on {device}" if is_there else rows)
    assert memory_of(torch.device("cpu")) == 0


@pytest.mark.parametrize(("device", "pins"), [("cpu", False), ("cuda", True), ("mps", False)])
def test_batches_are_pinned_for_an_nvidia_gpu(device: str, pins: bool, images: np.ndarray) -> None:
    arguments = TrainingArguments(train_batch_size=8, max_train_steps=3, dataloader_num_workers=0)
    loader = make_loader(arguments, array_dataset({"images": images}), 0, 1, torch.device(device))
    assert loader.pin_memory is pins


def test_what_goes_to_an_nvidia_gpu_is_pinned_first_and_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: "pinned" in done)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: done.append("pinned") or self)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, device, non_blocking: done.append((str(device), non_blocking))
    )
    tensor = torch.zeros(2)
    sent(tensor, "cuda:1")
    sent(tensor, "cuda")  # pinned already
    sent(tensor, "mps")
    assert done == ["pinned", ("cuda:1", True), ("cuda", True), ("mps", False)]


def test_the_next_batch_is_read_before_one_is_worked_on(images: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    monkeypatch.setattr("mnif.data.batches.sent", lambda tensor, device: tensor)
    rows = array_dataset({"images": images})
    taken = rows.__getitems__
    monkeypatch.setattr(rows, "__getitems__", lambda index: read.append(len(read)) or taken(index), raising=False)
    worked = [(len(read), batch) for batch in rows.batches(8, "cuda")]
    assert [count for count, _ in worked] == [2, 3, 4, 5, 5]
    expected = [*rows.batches(8)]
    for (_, found), batch in zip(worked, expected, strict=True):
        assert all(torch.equal(found[name], batch[name]) for name in batch)


@pytest.mark.parametrize("method", ["encoder", "auto-decoding", "meta"])
def test_a_model_is_the_same_wherever_its_data_live(method: str, picture_folder: Path, tmp_path: Path) -> None:
    flags = ["--data", str(picture_folder), "--method", method, "--max_train_steps", "3", "--refinement_steps", "1"]
    flags += ["--resolution", "8", "--cells", "1", "--num_bases", "4", "--width", "8", "--latent_dim", "8"]
    found = []
    for wanted in ("auto", "on"):
        run = tmp_path / wanted
        assert main(["fit", *flags, "--output_dir", str(run), "--data_on_device", wanted]) == 0
        (weights,) = (run / "model/decoder").glob("*.safetensors")
        found.append(load_file(weights) | load_file(run / "latents.safetensors"))
    one, other = found
    assert all(torch.equal(one[name], other[name]) for name in one)
    # A run goes on where it was, wherever its data are then.
    assert main(["fit", *flags, "--output_dir", str(tmp_path / "on"), "--data_on_device", "off"]) == 0
