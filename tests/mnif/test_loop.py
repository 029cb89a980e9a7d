import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import count, islice, product
from pathlib import Path
from random import random
from threading import Timer
from time import sleep

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from mnif.cli import main
from mnif.data.batches import InstanceGenerator, ShuffledBatches, array_dataset
from mnif.training import loop
from mnif.training.arguments import TrainingArguments
from mnif.training.checkpoints import newest_checkpoint
from mnif.training.loader import steps_of_epochs
from mnif.training.loop import TrainLoop, make_accelerator
from mnif.training.run_record import read_metrics_log
from mnif.utils import errors, process
from mnif.utils.errors import UserError
from mnif.utils.process import Terminated


class NoisyRegression(nn.Module):
    """A small network with dropout, so that a wrong random state or data order after a resume would show."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))

    def forward(self, x: torch.Tensor, y: torch.Tensor, key: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        return (self.network(x + 0.1 * InstanceGenerator(key).normal(3)) - y).square().mean()


def run(
    folder: Path,
    steps: int = 12,
    stop_after: int | None = None,
    kill_at: int | None = None,
    signals: Sequence[int] = (signal.SIGINT,),
    show: Callable[[], Image.Image] | None = None,
    **settings: object,
) -> torch.Tensor:
    """Trains and returns all weights in one vector.

    ``stop_after`` sends ``signals`` once that step is done; ``kill_at`` lets the process die within some milliseconds
    of so many steps, and before it has done eight more.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    arguments = TrainingArguments(max_train_steps=steps, train_batch_size=4, validation_steps=3, compile="off")
    for name, value in ({"checkpointing_steps": 4} | settings).items():
        setattr(arguments, name, value)
    torch.manual_seed(0)
    module = NoisyRegression()
    rows = array_dataset({"x": torch.randn(10, 3), "y": torch.randn(10, 1)})
    accelerator: Accelerator = make_accelerator(arguments, folder)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    ema = EMAModel(module.parameters(), decay=0.9)
    calls, forwards = 0, count(1)

    def count_down(*_: object) -> None:
        forward = next(forwards)
        if forward == kill_at:
            Timer(random() * 0.05, os.kill, (os.getpid(), signal.SIGKILL)).start()
        elif forward == kill_at + 8:
            sleep(60)

    if kill_at is not None:
        module.register_forward_pre_hook(count_down)

    def validate() -> dict[str, float]:
        nonlocal calls
        calls += 1
        if stop_after is not None and calls * 3 >= stop_after:
            for number in signals:
                os.kill(os.getpid(), number)
        return {"held_out": float(next(module.parameters()).detach().abs().mean())}

    folder.mkdir(exist_ok=True)
    train = TrainLoop(
        accelerator,
        arguments,
        module,
        [optimizer],
        rows,
        folder,
        "stage",
        validate,
        ema,
        keep_best="held_out",
        show=show,
    )
    train.run()
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def curves_of(folder: Path) -> list[dict[str, object]]:
    """A run's curves but for the seconds; every line of the file is one row."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == read_metrics_log(folder / "metrics.jsonl")
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


def test_interrupted_run_continues_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stop_after=6)
    assert [path.name for path in (tmp_path / "parts/checkpoints/stage").glob("checkpoint-*")] == [
        "checkpoint-4",
        "checkpoint-6",
    ] or (tmp_path / "parts/checkpoints/stage/checkpoint-6").is_dir()
    assert torch.equal(run(tmp_path / "parts"), whole)
    assert curves_of(tmp_path / "parts") == curves_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("signals", "error"),
    [
        ((signal.SIGTERM,), Terminated),
        ((signal.SIGINT, signal.SIGTERM), Terminated),
        ((signal.SIGTERM, signal.SIGINT, signal.SIGINT), Terminated),
        ((signal.SIGINT, signal.SIGINT), KeyboardInterrupt),
    ],
)
def test_signals_of_one_instant_are_one_wish_and_keep_the_checkpoint(
    tmp_path: Path, signals: Sequence[int], error: type[BaseException]
) -> None:
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt) as raised:
        run(tmp_path / "parts", stop_after=6, signals=signals)
    assert raised.type is error
    assert (tmp_path / "parts/checkpoints/stage/checkpoint-6/.sha256").is_file()
    assert torch.equal(run(tmp_path / "parts"), whole)


def test_a_second_wish_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with process.graceful_interrupt() as interrupted:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted() == [signal.SIGINT]
        later = process.time.monotonic() + 3
        monkeypatch.setattr(process.time, "monotonic", lambda: later)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("limit", [200, 1500, 4000])
def test_a_checkpoint_that_cannot_be_written_names_the_last_one(
    tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on file sizes stands for the full disk; whichever file it is that fails, by whichever library."""
    whole, folder = run(tmp_path / "whole"), tmp_path / "parts"
    save, before = Accelerator.save_state, resource.getrlimit(resource.RLIMIT_FSIZE)
    full = (
        f"{folder}/checkpoints/stage/checkpoint-8 cannot be written (.*); the last good checkpoint is .*checkpoint-4;"
    )

    def fail(accelerator: Accelerator, path: str, **options: object) -> str:
        if (folder / "checkpoints/stage/checkpoint-4").exists():
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        return save(accelerator, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "save_state", fail)
        try:
            with pytest.raises(UserError, match=full):
                run(folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in (folder / "checkpoints/stage").iterdir()) == ["best", "checkpoint-4"]
    assert torch.equal(run(folder), whole)
    assert curves_of(folder) == curves_of(tmp_path / "whole")


def test_run_killed_between_checkpoints_repeats_from_the_last(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", stop_after=6)
    shutil_target = tmp_path / "killed/checkpoints/stage/checkpoint-6"
    for file in shutil_target.iterdir():
        file.unlink()
    shutil_target.rmdir()
    with (tmp_path / "killed/metrics.jsonl").open("a") as curves:
        curves.write(
            '{"stage": "stage", "step": 9, "seconds": 1, "loss": 0.5}\n{"stage": "st'
        )  # beyond the checkpoint, and cut off
    assert torch.equal(run(tmp_path / "killed"), whole)
    assert curves_of(tmp_path / "killed") == curves_of(tmp_path / "whole")


def test_a_caller_may_stop_after_any_step(tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = TrainingArguments(max_train_steps=12, train_batch_size=4, compile="off")
    rows, module = array_dataset({"x": torch.randn(10, 3), "y": torch.randn(10, 1)}), NoisyRegression()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    accelerator = make_accelerator(arguments, tmp_path)
    train = TrainLoop(accelerator, arguments, module, [optimizer], rows, tmp_path, "stage", dict)
    before = signal.getsignal(signal.SIGINT)
    with closing(train.steps()) as steps:
        assert list(islice(steps, 3)) == [1, 2, 3]
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "checkpoints").exists()


def test_losses_between_two_records_are_kept_over_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at step 3 and 15, between two records, and at 6, where there is one; with several batches a step."""
    monkeypatch.setattr(loop, "LOG_STEPS", 6)
    run(tmp_path / "whole", steps=18, gradient_accumulation_steps=2)
    for stop_after in (3, 3, 9):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", steps=18, stop_after=stop_after, gradient_accumulation_steps=2)
    run(tmp_path / "parts", steps=18, gradient_accumulation_steps=2)
    assert curves_of(tmp_path / "parts") == curves_of(tmp_path / "whole")


def test_old_checkpoints_are_removed_and_the_best_weights_kept(tmp_path: Path) -> None:
    weights = run(tmp_path / "run", checkpointing_steps=2, checkpoints_total_limit=2)
    checkpoints = tmp_path / "run/checkpoints/stage"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["best", "checkpoint-10", "checkpoint-12"]
    best = load_file(checkpoints / "best/parameters.safetensors")
    assert torch.equal(torch.cat([best[str(i)].flatten() for i in range(len(best))]), weights)
    progress = json.loads((checkpoints / "checkpoint-12/progress.json").read_text())
    metrics = [row for row in read_metrics_log(tmp_path / "run/metrics.jsonl") if "held_out" in row]
    assert progress["best"] == min(row["held_out"] for row in metrics)


def test_accumulated_batches_cover_the_same_rows(tmp_path: Path) -> None:
    assert len(list(ShuffledBatches(10, 4, seed=0, start=0, stop=6))) == 6
    run(tmp_path / "run", gradient_accumulation_steps=2)
    state = torch.load(tmp_path / "run/checkpoints/stage/checkpoint-12/optimizer.bin")["state"]
    assert {int(moments["step"]) for moments in state.values()} == {12}  # the last step too is one


def test_epochs_are_passes_over_the_data_however_many_batches_a_step_sums_up() -> None:
    for epochs, batch_size, accumulation, instances in product((1, 10), (4, 64), (1, 3, 4), (22, 64)):
        steps = steps_of_epochs(epochs, batch_size, accumulation, instances)
        per_pass = instances // min(batch_size, instances)  # whole batches
        batches = steps * accumulation
        assert epochs * per_pass <= batches < epochs * per_pass + accumulation
    assert steps_of_epochs(10, 8, 4, 64) == 20  # not 80


def test_diverging_run_keeps_the_last_good_checkpoint_and_names_the_flag_to_lower(tmp_path: Path) -> None:
    message = r"not finite at step 3; no checkpoint was written yet; lower --learning_rate .* anew"
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", max_grad_norm=float("nan"))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "late", stop_after=6)
    checkpoints = tmp_path / "late/checkpoints/stage"
    best = (checkpoints / "best/parameters.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"not finite at step 8; the last good checkpoint is .*checkpoint-6"):
        run(tmp_path / "late", max_grad_norm=float("nan"), validation_steps=100)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["best", "checkpoint-4", "checkpoint-6"]
    assert (checkpoints / "best/parameters.safetensors").read_bytes() == best


def test_unknown_tracker_and_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--report_to zigzag: Accelerate knows"):
        run(tmp_path / "a", report_to="zigzag")
    with pytest.raises(UserError, match="not a checkpoint folder"):
        run(tmp_path / "b", resume_from_checkpoint="nowhere")


def test_damaged_checkpoint_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", stop_after=6)
    newest, older = (tmp_path / f"run/checkpoints/stage/checkpoint-{step}" for step in (6, 4))
    flipped = bytearray((newest / "model.safetensors").read_bytes())
    flipped[-1] ^= 1  # the file still loads, with one weight slightly wrong
    (newest / "model.safetensors").write_bytes(flipped)
    capsys.readouterr()
    assert torch.equal(run(tmp_path / "run"), whole)
    printed = capsys.readouterr().out
    assert f"{newest}: damaged (its content is not what was written); it is passed over" in printed
    assert f"resuming from {older}" in printed


def test_only_damaged_checkpoints_say_how_to_begin_anew(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", stop_after=6)
    folder = tmp_path / "run/checkpoints/stage"
    (folder / "checkpoint-6/optimizer.bin").write_bytes(b"junk")
    (folder / "checkpoint-4/progress.json").write_text("{")
    with pytest.raises(UserError, match=r"checkpoint-6: damaged, and no older .* --resume_from_checkpoint no"):
        run(tmp_path / "run")
    with pytest.raises(UserError, match="checkpoint-4: damaged"):
        run(tmp_path / "run", resume_from_checkpoint=str(folder / "checkpoint-4"))
    run(tmp_path / "run", resume_from_checkpoint="no")


def test_checkpoint_without_a_seal_is_not_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", stop_after=6)
    newest, older = (tmp_path / f"run/checkpoints/stage/checkpoint-{step}" for step in (6, 4))
    (newest / ".sha256").unlink()
    assert newest_checkpoint(newest.parent) == older
    capsys.readouterr()
    assert torch.equal(run(tmp_path / "run", checkpoints_total_limit=1), whole)
    printed = capsys.readouterr().out
    assert (
        f"{newest}: damaged (it was not written to its end, or its seal .sha256 is lost); it is passed over" in printed
    )
    assert f"resuming from {older}" in printed
    assert sorted(path.name for path in newest.parent.iterdir()) == ["best", "checkpoint-12"]
    assert curves_of(tmp_path / "run") == curves_of(tmp_path / "whole")


@pytest.mark.parametrize("how", ["lost seal", "flipped bit"])
def test_damaged_best_weights_are_refused(tmp_path: Path, how: str) -> None:
    run(tmp_path / "run")
    best = tmp_path / "run/checkpoints/stage/best"
    if how == "lost seal":
        (best / ".sha256").unlink()
    else:
        flipped = bytearray((best / "parameters.safetensors").read_bytes())
        flipped[-1] ^= 1
        (best / "parameters.safetensors").write_bytes(flipped)
    with pytest.raises(UserError, match=r"best: damaged \(.*\); begin anew with --resume_from_checkpoint no"):
        run(tmp_path / "run")


def test_best_weights_put_aside_by_a_killed_process_come_back(tmp_path: Path) -> None:
    """Where names cannot be exchanged, a kill between two renames leaves nothing under the name itself."""
    whole = run(tmp_path / "whole")
    run(tmp_path / "run")
    best = tmp_path / "run/checkpoints/stage/best"
    best.rename(best.with_name(".best.abcdef_8.old"))
    (best.parent / ".best.abcdef_9.tmp").mkdir()
    assert torch.equal(run(tmp_path / "run"), whole)
    assert best.is_dir()
    assert not list(best.parent.glob(".*"))


@pytest.mark.slow
def test_killed_at_random_steps_the_same_command_ends_with_the_same_weights(tmp_path: Path) -> None:
    """SIGKILL, which nothing can answer: at any moment, in the middle of writing a checkpoint too."""
    whole = run(tmp_path / "whole", steps=40)
    program = "import sys, pathlib; sys.path.insert(0, sys.argv[1]); from tests.mnif.test_loop import run; "
    program += "run(pathlib.Path(sys.argv[2]), steps=40, kill_at=int(sys.argv[3]))"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    steps = np.random.default_rng().integers(3, 12, size=2)  # of each life; differs from test to test
    for kill_at in steps:
        command = [
            sys.executable,
            "-c",
            program,
            str(Path(__file__).parents[2]),
            str(tmp_path / "killed"),
            str(kill_at),
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "killed/checkpoints/stage/checkpoint-40").exists()
    assert torch.equal(run(tmp_path / "killed", steps=40), whole), f"killed after {steps} steps"
    assert not list((tmp_path / "killed/checkpoints/stage").glob(".*"))
    assert curves_of(tmp_path / "killed") == curves_of(tmp_path / "whole")


@pytest.mark.parametrize("rows", [3, 10])
def test_batches_are_a_function_of_seed_and_step(rows: int) -> None:
    whole = list(ShuffledBatches(rows, 4, seed=5, start=0, stop=20))
    assert whole[7:] == list(ShuffledBatches(rows, 4, seed=5, start=7, stop=20))
    other = list(ShuffledBatches(rows, 4, seed=6, start=0, stop=20))
    assert (whole != other) == (rows > 4)  # with as many places as rows every row has a place of its own
    per_epoch = rows // min(4, rows)
    seen = [row for batch in whole[:per_epoch] for row in batch]
    assert len(seen) == len(set(seen)) == per_epoch * min(4, rows)
    assert all(row % min(4, rows) == place for batch in whole for place, row in enumerate(batch))
    if rows == 10:  # every row's turn comes, those beyond the last whole batch of an epoch too
        assert {row for batch in whole for row in batch} == set(range(10))


def test_a_run_of_a_constant_learning_rate_that_is_made_longer_is_one_that_was_longer_at_once(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", steps=12, lr_scheduler="constant")
    run(tmp_path / "parts", steps=7, lr_scheduler="constant")
    assert torch.equal(run(tmp_path / "parts", steps=12, lr_scheduler="constant"), whole)


def test_a_tracker_gets_flags_curves_and_pictures_under_the_name_of_the_run(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain")
    drawn = []

    def show() -> Image.Image:
        drawn.append(1)
        return Image.new("RGB", (6, 4), "red")

    assert torch.equal(run(tmp_path / "avatars", report_to="tensorboard", show=show), plain)
    (events,) = (tmp_path / "avatars/logs/avatars/stage").glob("events.*")
    told = EventAccumulator(str(events)).Reload()
    assert {"loss", "held_out", "learning_rate"} <= {*told.Tags()["scalars"]}
    assert [event.step for event in told.Scalars("held_out")] == [3, 6, 9, 12]
    assert [event.step for event in told.Images("stage")] == [3, 6, 9, 12]
    assert np.asarray(Image.open(io.BytesIO(told.Images("stage")[0].encoded_image_string))).shape == (4, 6, 3)
    assert len(drawn) == 4
    (hyperparameters,) = (tmp_path / "avatars/logs/avatars/stage").glob("*/hparams.yml")
    assert yaml.safe_load(hyperparameters.read_text())["max_train_steps"] == 12
    run(tmp_path / "other", report_to="tensorboard", tracker_project_name="mine")
    assert (tmp_path / "other/logs/mine/stage").is_dir()


def test_a_tracker_that_is_not_installed_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "get_available_trackers", list)
    monkeypatch.setattr(errors, "find_spec", lambda module: None)
    for command in (["fit", "--data", "nowhere", "--signal", "image", "--output_dir"], ["prior", "--run"]):
        (tmp_path / "run").mkdir(exist_ok=True)
        assert main([*command, f"{tmp_path}/run", "--report_to", "tensorboard"]) == 2
        message = capsys.readouterr().err
        assert '--report_to tensorboard: the package "tensorboard" is missing; run: pip install' in message
        assert message.count("\n") == 1
    with pytest.raises(UserError, match="--report_to wandb: its package is missing"):
        run(tmp_path / "a", report_to="wandb")


@pytest.mark.parametrize(
    ("given", "told", "taken"),
    [(None, None, "no"), (None, "bf16", "bf16"), ("no", "bf16", "no"), ("bf16", None, "bf16")],
)
def test_the_precision_is_accelerates_unless_a_flag_says_another(
    given: str | None, told: str | None, taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if told is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)  # as `accelerate launch --mixed_precision` does
    arguments = TrainingArguments(mixed_precision=given)
    assert make_accelerator(arguments, tmp_path).mixed_precision == taken
    assert arguments.mixed_precision == taken  # which is what the run remembers
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator has it")
def test_a_precision_that_is_not_to_be_had_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--mixed_precision fp16: needs a GPU, and there is none here"):
        run(tmp_path / "a", mixed_precision="fp16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UserError, match=r"--mixed_precision fp8 \(of accelerate\): must be one of no, fp16, bf16"):
        run(tmp_path / "b")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there, which rounds as it is told")
def test_tf32_needs_a_card_that_has_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--allow_tf32: needs an NVIDIA GPU, and there is none here; leave it out"):
        make_accelerator(TrainingArguments(allow_tf32=True), tmp_path)
    assert torch.get_float32_matmul_precision() == "highest"
