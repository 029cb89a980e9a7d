"""What lets a run grow: learned latents that cost a step nothing, and several processes that learn what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mnif.cli import main
from mnif.data.batches import ShuffledBatches
from mnif.latents.embedding import LatentEmbedding
from mnif.latents.table import LatentTable
from mnif.training.methods import MetaMethod
from mnif.training.run_record import read_metrics_log
from mnif.utils.errors import UserError

SMALL = ["--resolution", "16", "--cells", "2", "--num_bases", "8", "--width", "8", "--depth", "1"]
SMALL += ["--latent_dim", "12", "--refinement_steps", "4"]
QUICK = ["--max_train_steps", "20", "--validation_steps", "10", "--train_batch_size", "16", "--compile", "off"]
TENSORS = ("latents", "mean", "square", "steps")

# Runs `mnif` commands, with latents that start at zero: each process would draw noise of its own.
WITHOUT_NOISE = """
import json, sys
from mnif.cli import main
from mnif.training.methods import MetaMethod

MetaMethod.__init__.__defaults__ = (0.0, 0.0)
sys.exit(max(main(command) for command in json.loads(sys.argv[1])))
"""

# Runs a `mnif` command; the second process gets a signal just before the step of the given number.
SIGNALLED = """
import os, signal, sys
from mnif.cli import main
from mnif.training.methods import AutoDecoderMethod

number, at, forward, steps = getattr(signal, sys.argv[1]), int(sys.argv[2]), AutoDecoderMethod.forward, []

def signalled(self, **batch):
    steps.append(len(steps))
    if len(steps) == at and os.environ["RANK"] == "1":
        os.kill(os.getpid(), number)
    return forward(self, **batch)

AutoDecoderMethod.forward = signalled
sys.exit(main(sys.argv[3:]))
"""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def rows_of_process(process: int = 0, processes: int = 1, instances: int = 22, lanes: int = 8) -> LatentEmbedding:
    return LatentEmbedding(instances, 5, lanes, 0.1, seed=3, process=process, processes=processes)


def move(rows: LatentEmbedding, batch: Tensor, gradients: Tensor) -> None:
    (rows.take(batch) * gradients).sum().backward()
    rows.step()


def table_of(rows: LatentEmbedding) -> Tensor:
    return rows.read(torch.arange(rows.instances)).clone()


def trained(rows: LatentEmbedding, steps: int = 9) -> LatentEmbedding:
    """After steps with gradients that are a function of step and row alone."""
    for step, batch in enumerate(ShuffledBatches(rows.instances, rows.lanes, 0, 0, steps)):
        own = torch.tensor(batch)[rows.owns(torch.tensor(batch))]
        gradients = torch.randn(rows.instances, 5, generator=torch.Generator().manual_seed(step))
        move(rows, own, gradients[own])
    return rows


def gradients_of(rows: int) -> Tensor:
    """Between 0.5 and 1.5 in size: PyTorch's optimizers differ in where they add their epsilon to small ones."""
    return (0.5 + torch.rand(rows, 5)) * torch.randn(rows, 5).sign()


def sparse_adam(rows: LatentEmbedding) -> tuple[torch.nn.Embedding, torch.optim.SparseAdam]:
    table = torch.nn.Embedding.from_pretrained(table_of(rows), freeze=False, sparse=True)
    return table, torch.optim.SparseAdam(table.parameters(), lr=rows.learning_rate, betas=rows.betas)


def two_processes(arguments: list[str], check: bool = True) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*launch, *arguments], stdout=PIPE, stderr=PIPE, text=True, env=environment)
    try:
        output, errors = process.communicate(timeout=300)
    finally:
        process.terminate()  # torchrun then ends its processes too
    assert not check or process.returncode == 0, errors
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def assert_same_run(one: Path, two: Path, latents: float = 1e-5) -> None:
    """Weights to 1e-5, latents to ``latents``, figures to 1e-3 dB."""
    for file in sorted((one / "model").rglob("*.safetensors")):
        weights, others = load_file(file), load_file(two / file.relative_to(one))
        for name, tensor in weights.items():
            torch.testing.assert_close(others[name], tensor, atol=1e-5, rtol=0)
    tables = [LatentTable.load(folder / "latents.safetensors") for folder in (one, two)]
    assert tables[0].ids == tables[1].ids
    torch.testing.assert_close(tables[1].latents, tables[0].latents, atol=latents, rtol=0)
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (one, two)]
    assert metrics[0].keys() == metrics[1].keys()
    for name in metrics[0]:
        if name.startswith("psnr"):
            assert metrics[1][name] == pytest.approx(metrics[0][name], abs=1e-3)
    curves = [
        [row for row in read_metrics_log(folder / "metrics.jsonl") if "psnr_train" in row] for folder in (one, two)
    ]
    assert [row["step"] for row in curves[1]] == [row["step"] for row in curves[0]]
    for row, other in zip(*curves, strict=True):
        assert other["psnr_train"] == pytest.approx(row["psnr_train"], abs=1e-3)


def test_rows_move_as_in_sparse_adam_once_bias_correction_is_over() -> None:
    rows = rows_of_process()
    table, optimizer = sparse_adam(rows)
    rows.steps += 1_000_000
    moments = {name: torch.zeros_like(table.weight) for name in ("exp_avg", "exp_avg_sq")}
    optimizer.state[table.weight] = {"step": 1_000_000} | moments
    for batch in ([0, 9, 21], [0, 2, 13], [0, 9, 5], [20, 7, 6], [0, 9, 21]):
        gradients = gradients_of(3)
        move(rows, torch.tensor(batch), gradients)
        optimizer.zero_grad()
        (table(torch.tensor(batch)) * gradients).sum().backward()
        optimizer.step()
        torch.testing.assert_close(table_of(rows), table.weight.detach())


def test_rows_move_as_in_sparse_adam_from_the_start_if_all_are_in_every_batch() -> None:
    rows = rows_of_process()
    table, optimizer = sparse_adam(rows)
    for _ in range(5):
        batch, gradients = torch.randperm(22), gradients_of(22)
        move(rows, batch, gradients)
        optimizer.zero_grad()
        (table(batch) * gradients).sum().backward()
        optimizer.step()
        torch.testing.assert_close(table_of(rows), table.weight.detach())


def test_a_row_whose_turn_comes_late_moves_as_in_adam_of_its_own() -> None:
    """SparseAdam corrects by the steps of the whole table, which makes a late row's first step √10 times too long."""
    rows = rows_of_process()
    table, optimizer = sparse_adam(rows)
    alone = table_of(rows)[13].requires_grad_()
    adam = torch.optim.Adam([alone], lr=rows.learning_rate, betas=rows.betas)
    for batch in [[4]] * 2000 + [[13]]:
        optimizer.zero_grad()
        table(torch.tensor(batch)).sum().backward()
        optimizer.step()
    late = (table_of(rows)[13] - table.weight.detach()[13]) / rows.learning_rate
    torch.testing.assert_close(late, torch.full((5,), 10**0.5), rtol=0.1, atol=0)
    for batch in ([4], [4], [13], [4], [13], [7], [13]):
        gradients = gradients_of(1)
        move(rows, torch.tensor(batch), gradients)
        if batch == [13]:
            alone.grad = gradients[0]
            adam.step()
        torch.testing.assert_close(table_of(rows)[13], alone.detach())


def test_a_step_changes_the_rows_of_its_batch_only() -> None:
    rows = trained(rows_of_process())
    before = {name: getattr(rows, name).clone() for name in TENSORS}
    batch = torch.tensor([3, 12, 21])
    move(rows, batch, torch.ones(3, 5))
    for name in TENSORS:
        changed = (getattr(rows, name) != before[name]).reshape(8, 3, -1).any(dim=2)
        assert {(int(lane), int(turn)) for lane, turn in changed.nonzero()} == {(3, 0), (4, 1), (5, 2)}, name


def test_accumulated_batches_are_one_step_and_a_scaled_loss_is_none_the_longer() -> None:
    gradients = gradients_of(3)
    rows, others, skipped = rows_of_process(), rows_of_process(), rows_of_process()
    move(rows, torch.tensor([0, 9, 21]), torch.stack([gradients[0] + gradients[2], gradients[1], gradients[1]]))
    (others.take(torch.tensor([0, 9])) * gradients[:2] * 1e-4).sum().backward()
    (others.take(torch.tensor([21, 0])) * gradients[1:] * 1e-4).sum().backward()
    others.step(scale=1e-4)
    (skipped.take(torch.tensor([0])) * float("inf")).sum().backward()
    skipped.forget()
    move(skipped, torch.tensor([0, 9, 21]), torch.stack([gradients[0] + gradients[2], gradients[1], gradients[1]]))
    for name in TENSORS:
        torch.testing.assert_close(getattr(others, name), getattr(rows, name))
        assert torch.equal(getattr(skipped, name), getattr(rows, name))


def test_latents_learn_where_the_loss_is_compiled() -> None:
    plain, compiled = rows_of_process(), rows_of_process()

    def loss(rows: LatentEmbedding, batch: Tensor) -> Tensor:
        return (rows.take(batch) - 1).square().mean()

    quick = torch.compile(loss, backend="eager")
    for batch in ([0, 9], [0, 5], [21, 9]):
        for rows, function in ((plain, loss), (compiled, quick)):
            function(rows, torch.tensor(batch)).backward()
            rows.step()
    assert torch.equal(table_of(compiled), table_of(plain))
    assert not torch.equal(table_of(plain), table_of(rows_of_process()))


def test_processes_share_the_rows_out_and_start_where_one_would() -> None:
    whole = rows_of_process()
    for processes in (2, 4):
        shares = [rows_of_process(process, processes) for process in range(processes)]
        every = torch.arange(22)
        assert torch.stack([share.owns(every) for share in shares]).sum(dim=0).tolist() == [1] * 22
        for share in shares:
            own = every[share.owns(every)]
            assert torch.equal(share.read(own), whole.read(own))
            for name in TENSORS:
                assert getattr(share, name).numel() * processes == getattr(whole, name).numel()
            for batch in ShuffledBatches(22, 8, seed=1, start=0, stop=6):
                # Accelerate gives each process an equal run of places of every batch.
                part = batch[share.process * 8 // processes : (share.process + 1) * 8 // processes]
                assert share.owns(torch.tensor(batch)).nonzero().flatten().tolist() == [batch.index(r) for r in part]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (1, 1)])
def test_checkpoints_of_any_number_of_processes(before: int, after: int, tmp_path: Path) -> None:
    whole = trained(rows_of_process())
    for process in range(before):
        trained(rows_of_process(process, before)).save(tmp_path)
    assert torch.equal(rows_of_process().read_all(tmp_path), table_of(whole))
    for process in range(after):
        share = rows_of_process(process, after)
        share.load(tmp_path)
        for name in TENSORS:
            mine = getattr(whole, name)[share.own.start : share.own.stop]
            assert torch.equal(getattr(share, name), mine)


def test_missing_and_foreign_latents_are_refused(tmp_path: Path) -> None:
    rows = rows_of_process()
    with pytest.raises(UserError, match="8 of 8 lanes of latents are missing"):
        rows.load(tmp_path)
    for process in range(2):
        rows_of_process(process, 2).save(tmp_path)
    _, second = sorted(tmp_path.iterdir())
    for other, words in (
        (rows_of_process(instances=23), "latents of 22 instances, not 23"),
        (rows_of_process(lanes=7), "latents for batches of 8, not 7"),
        (LatentEmbedding(22, 6, 8, 0.1, seed=3), "latents of 5 numbers, not 6"),
    ):
        with pytest.raises(UserError, match=words):
            other.load(tmp_path)
    kept = second.read_bytes()
    second.unlink()
    with pytest.raises(UserError, match="4 of 8 lanes of latents are missing"):
        rows.load(tmp_path)
    with pytest.raises(UserError, match="4 of 8 lanes of latents are missing"):
        rows.read_all(tmp_path)
    rows_of_process(0, 2).load(tmp_path)  # its share is there
    second.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(UserError, match=f"{second}: damaged latents"):
        rows.load(tmp_path)
    save_file({"latents": torch.zeros(1)}, second)
    with pytest.raises(UserError, match="not a file of latents"):
        rows.load(tmp_path)


@pytest.mark.slow
def test_two_processes_learn_the_latents_that_one_does(picture_folder: Path, tmp_path: Path) -> None:
    fit = ["fit", "--data", str(picture_folder), "--method", "auto-decoding", *SMALL, *QUICK, "--output_dir"]
    assert main([*fit, str(tmp_path / "one")]) == 0
    done = two_processes(["-m", "--", "mnif", *fit, str(tmp_path / "two")])
    assert done.stdout.count("pictures to train") == 1
    assert_same_run(tmp_path / "one", tmp_path / "two")
    sizes = {}
    for processes in ("one", "two"):
        for path in (tmp_path / processes / "checkpoints/fit/checkpoint-20").glob("latent-rows-*"):
            with safe_open(path, framework="pt") as file:
                sizes.setdefault(processes, []).append(file.get_slice("latents").get_shape()[0])
    assert sizes == {"one": [16], "two": [8, 8]}


@pytest.fixture
def varied_folder(tmp_path: Path) -> Path:
    """48 pictures of patches that span all of their dimensions.

    Muon makes a step in every direction of a gradient equally long. In one that no picture shows, such as those of
    flat drawings, what is lengthened is rounding error, which differs between one and two processes.
    """
    folder = tmp_path / "varied"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(48):
        coarse = generator.integers(0, 256, (6, 6, 3)).astype(np.uint8)
        Image.fromarray(coarse).resize((16, 16), Image.Resampling.BICUBIC).save(folder / f"{index:03d}.png")
    return folder


@pytest.mark.slow
def test_two_processes_learn_what_one_does_by_the_other_methods(
    varied_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without noise, which each process draws for itself."""
    (tmp_path / "run.py").write_text(WITHOUT_NOISE)
    monkeypatch.setattr(MetaMethod.__init__, "__defaults__", (0.0, 0.0))
    commands = {}
    for processes in ("one", "two"):
        fit = ["fit", "--data", str(varied_folder), *SMALL, *QUICK]
        commands[processes] = [
            [*fit, "--method", "meta", "--output_dir", f"{tmp_path}/meta-{processes}"],
            [*fit, "--method", "encoder", "--latent_noise", "0", "--output_dir", f"{tmp_path}/encoder-{processes}"],
        ]
    assert [main(command) for command in commands["one"]] == [0, 0]
    two_processes([str(tmp_path / "run.py"), json.dumps(commands["two"])])
    for method in ("meta", "encoder"):
        assert_same_run(tmp_path / f"{method}-one", tmp_path / f"{method}-two")


@pytest.mark.slow
def test_one_process_continues_what_two_began(picture_folder: Path, tmp_path: Path) -> None:
    """The second of two is killed after step 7; both continue; the second is asked to stop; one alone finishes."""
    (tmp_path / "run.py").write_text(SIGNALLED)
    fit = ["fit", "--data", str(picture_folder), "--method", "auto-decoding", *SMALL, *QUICK]
    parts = [*fit, "--checkpointing_steps", "5", "--output_dir", str(tmp_path / "parts")]
    checkpoints = tmp_path / "parts/checkpoints/fit"
    done = two_processes([str(tmp_path / "run.py"), "SIGKILL", "8", *parts], check=False)
    assert done.returncode != 0
    assert [path.name for path in checkpoints.glob("checkpoint-*")] == ["checkpoint-5"]
    done = two_processes([str(tmp_path / "run.py"), "SIGTERM", "4", *parts], check=False)
    assert "resuming from" in done.stdout
    assert "stopped at step 9" in done.stdout, done.stderr
    assert {path.name for path in checkpoints.glob("checkpoint-*")} == {"checkpoint-5", "checkpoint-9"}
    assert main(parts) == 0
    assert main([*fit, "--output_dir", str(tmp_path / "whole")]) == 0
    # Two processes add gradients up in another order, and Adam divides a small one by its own size.
    assert_same_run(tmp_path / "whole", tmp_path / "parts", latents=3e-5)
