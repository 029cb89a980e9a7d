"""Students: what they learn, how they stand in the model folder, and the distance they are judged by."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import latent_prior.distillation
from latent_prior.commands.prior import add_prior
from latent_prior.denoisers import ResMLPDenoiser
from latent_prior.diffusion import noise_levels, student_scheduler
from latent_prior.distillation import (
    DistillationLoss,
    Pairs,
    Teacher,
    energy_distance,
    student_timesteps,
    teacher_pairs,
)
from latent_prior.pipeline import MNIFPipeline, load_pipeline
from latent_prior.sampling import initial_noise
from mnif.cli import main
from mnif.data.batches import instance_keys
from mnif.latents.table import LatentTable
from mnif.models.io import load_component, save_component
from mnif.models.mnif_model import MNIFModel
from mnif.training.run_record import read_metrics_log


def test_energy_distance_of_a_few_points_by_hand() -> None:
    x, y = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    across = (0 + 2 + 5 + math.hypot(3, 2)) / 4
    assert energy_distance(x, y) == pytest.approx(2 * across - 5 - 2, abs=1e-12)


def test_energy_distance_of_gaussians_in_closed_form() -> None:
    """E|N(m, s²)| = s √(2/π) exp(−m²/2s²) + m (1 − 2Φ(−m/s)), the mean of a folded normal distribution."""
    torch.manual_seed(0)
    x, y = torch.randn(4000, 1), 1.5 + 2 * torch.randn(4000, 1)

    def folded(mean: float, std: float) -> float:
        beyond = math.erf(mean / (std * math.sqrt(2)))
        return std * math.sqrt(2 / math.pi) * math.exp(-(mean**2) / (2 * std**2)) + mean * beyond

    exact = 2 * folded(1.5, math.sqrt(5)) - folded(0, math.sqrt(2)) - folded(0, math.sqrt(8))
    assert energy_distance(x, y) == pytest.approx(exact, abs=0.06)
    assert energy_distance(x[:2000], x[2000:]) == pytest.approx(0, abs=0.01)


class Knowing(ResMLPDenoiser):
    """A student that gives the answer it was handed, whatever it is asked."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor | float, *_: object) -> torch.Tensor:
        return self.answer


def test_students_come_by_the_timesteps_of_all_their_numbers_of_steps() -> None:
    assert student_timesteps((1,)) == [999]
    assert student_timesteps((1, 2, 4)) == student_timesteps((4, 2)) == [999, 749, 499, 249]
    assert student_timesteps((3, 2)) == [999, 666, 499, 332]


def test_a_student_that_knows_has_no_loss_from_any_timestep() -> None:
    student = Knowing(latent_dim=4, width=8, depth=1)
    student.answer = torch.randn(6, 4)
    samples = student.answer[:, None].expand(-1, 3, -1)
    loss, keys = DistillationLoss(student, torch.tensor([999, 749, 499])), torch.arange(6)
    assert loss(torch.randn(6, 3, 4), samples, keys).item() == 0
    assert loss(torch.randn(6, 3, 4), samples + 2, keys).item() == pytest.approx(4)
    shifted = samples + torch.tensor([1.0, 2.0, 3.0])[:, None]
    errors = loss.errors(torch.randn(6, 3, 4), shifted)
    assert errors == pytest.approx(
        {"error_999": 1, "error_749": 4, "error_499": 9, "validation_loss": 1 / 2 + (4 + 9) / 4}
    )


def test_half_of_a_batch_starts_from_noise() -> None:
    loss = DistillationLoss(Knowing(latent_dim=1, width=8, depth=1), torch.tensor([999, 749, 499, 249]))
    loss.student.answer = torch.zeros(9000, 1)
    from_noise = torch.zeros(9000, 4, 1)
    from_noise[:, 0] = 1
    keys = instance_keys(0, 0, torch.arange(9000))
    assert loss(torch.randn(9000, 4, 1), from_noise, keys).item() == pytest.approx(0.5, abs=0.03)
    assert loss(torch.randn(9000, 4, 1), from_noise.flip(1), keys).item() == pytest.approx(1 / 6, abs=0.03)


class Mixture(ResMLPDenoiser):
    """A mixture of five Gaussians in the plane, whose posterior mean of x₀ is known in closed form."""

    std = 0.15
    means = torch.tensor([[-1.2, -1.0], [1.0, 1.3], [-0.8, 1.0], [1.3, -1.0], [0.0, 0.0]], dtype=torch.float64)

    def __init__(self, objective: str):
        super().__init__(latent_dim=self.means.shape[1], width=8, depth=1)
        self.objective = objective

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor | float, *_: object) -> torch.Tensor:
        levels = noise_levels(self.objective, torch.as_tensor(timestep).reshape(-1))
        alpha, sigma = (level.double()[:, None] for level in levels)
        spread = alpha**2 * self.std**2 + sigma**2
        apart = sample.double()[:, None] - alpha[..., None] * self.means
        share = (-apart.square().sum(dim=-1) / (2 * spread)).softmax(dim=-1)
        clean = (share[..., None] * (self.means + (alpha * self.std**2 / spread)[..., None] * apart)).sum(dim=1)
        noise = (sample - alpha * clean) / sigma
        found = {"x0": clean, "v": alpha * noise - sigma * clean, "flow": noise - clean}
        return found[self.objective].to(sample)

    def outside(self, points: torch.Tensor) -> float:
        """The share of points further than four standard deviations from every mean; of the mixture's own 0.0003."""
        nearest = torch.cdist(points.double(), self.means).min(dim=1).values
        return (nearest > 4 * self.std).double().mean().item()


@pytest.mark.parametrize("timestep", [999, 749, 249])
def test_teachers_of_all_objectives_end_at_the_same_samples(timestep: int) -> None:
    """The deterministic sampler follows the same curves whatever is predicted and however noise is scheduled."""
    torch.manual_seed(0)
    alpha, sigma = noise_levels("x0", torch.tensor([timestep]))
    clean = Mixture.means[torch.randint(5, (200,))].float() + Mixture.std * torch.randn(200, 2)
    states = alpha * clean + sigma * torch.randn(200, 2)
    ends = {name: Teacher(Mixture(name), name, 200).samples(states, timestep) for name in ("x0", "v", "flow")}
    torch.testing.assert_close(ends["v"], ends["x0"], atol=1e-3, rtol=0)
    differs = (ends["flow"] - ends["x0"]).norm(dim=1)
    assert differs.median() < 0.01  # Euler's steps, of first order; a few points lie between two curves
    assert differs.quantile(0.9) < 0.06
    assert Mixture("x0").outside(ends["x0"]) < 0.01


def test_students_of_an_exact_teacher_reach_it_and_gain_from_more_steps() -> None:
    torch.manual_seed(0)
    timesteps = student_timesteps((1, 4))
    exact = Mixture("x0")
    teacher = Teacher(exact, "x0", 20)
    noise = torch.randn(4096, len(timesteps), 2)
    samples = [teacher.samples(noise[:, 0], 999)]
    for place, timestep in enumerate(timesteps[1:], start=1):
        alpha, sigma = noise_levels("x0", torch.tensor([timestep]))
        noise[:, place] = alpha * samples[0] + sigma * noise[:, place]
        samples.append(teacher.samples(noise[:, place], timestep))
    ends = torch.stack(samples, dim=1)
    student = ResMLPDenoiser(latent_dim=2, width=16, depth=2)
    loss = DistillationLoss(student, torch.tensor(timesteps))
    optimizer = torch.optim.Adam(student.parameters(), lr=6e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for step in range(400):
        rows = torch.randint(len(noise), (192,))
        optimizer.zero_grad()
        loss(noise[rows], ends[rows], instance_keys(0, step, rows)).backward()
        optimizer.step()
        schedule.step()
    unseen, data = torch.randn(2000, 2), teacher.samples(torch.randn(2000, 2), 999)
    drawn = {}
    for steps in (1, 4):
        scheduler, state = student_scheduler(), unseen
        scheduler.set_timesteps(steps)
        with torch.no_grad():
            for timestep in scheduler.timesteps:
                state = scheduler.step(student(state, timestep), timestep, state).prev_sample
        drawn[steps] = state
    first = Teacher(exact, "x0", 1).samples(unseen, 999)
    assert max(energy_distance(points, data) for points in drawn.values()) < 0.04 < energy_distance(first, data) / 10
    assert exact.outside(drawn[4]) < 0.01 < exact.outside(drawn[1])  # the later steps put right what lay in between


def test_pairs_are_kept_continued_and_belong_to_their_teacher(
    pipeline: MNIFPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_prior.distillation, "_CHUNK", 4)
    solved: list[int] = []

    def counted(teacher: Teacher, states: torch.Tensor, timestep: int) -> torch.Tensor:
        solved.append(timestep)
        return samples_of(teacher, states, timestep)

    samples_of = Teacher.samples
    monkeypatch.setattr(Teacher, "samples", counted)
    save_component(tmp_path / "model", "denoiser", pipeline.denoiser)

    def pairs(count: int, steps: int = 2, timesteps: tuple[int, ...] = (999, 499)) -> Pairs:
        found = (tmp_path / "pairs", tmp_path / "model", pipeline, count, 3, steps, timesteps, Accelerator(cpu=True))
        return teacher_pairs(*found)

    some = pairs(6)
    assert some.states.shape == some.samples.shape == (6, 2, 12)
    assert solved == [999, 499] * 2
    more = pairs(10)
    assert solved == [999, 499] * 3  # only the third chunk is new
    assert torch.equal(more.samples[:6], some.samples)
    assert torch.equal(more.states[:6], some.states)
    noise = some.states[:, 0]
    latents = pipeline(latents=noise, num_inference_steps=2, output_type="latent").images
    torch.testing.assert_close(pipeline.denoiser.to_latents(some.samples[:, 0]), latents, atol=1e-5, rtol=1e-5)
    alpha, sigma = noise_levels("x0", torch.tensor([499]))
    added = (some.states[:, 1] - alpha * some.samples[:, 0]) / sigma
    used = set(map(tuple, initial_noise(3, range(200), 12).tolist()))
    assert not set(map(tuple, noise.tolist())) & used
    assert abs(torch.corrcoef(torch.stack([added.flatten(), noise.flatten()]))[0, 1]) < 0.4
    assert added.std().item() == pytest.approx(1, abs=0.3)
    pairs(4, steps=4)
    assert len(solved) == 8  # another search: what was kept is of no use
    assert pairs(4, 4, (999,)).samples.shape == (4, 1, 12)


@pytest.fixture
def run(pipeline: MNIFPipeline, tmp_path: Path) -> Path:
    """A run folder with a prior of random weights."""
    run = tmp_path / "run"
    save_component(run / "model", "decoder", pipeline.decoder)
    add_prior(run / "model", pipeline)
    held_out = torch.arange(40) % 5 == 0
    table = LatentTable(
        torch.randn(40, 12), [str(i) for i in range(40)], held_out, pipeline.decoder.fingerprint(), "noise"
    )
    table.save(run / "latents.safetensors")
    return run


QUICK = ["--num_pairs", "200", "--max_train_steps", "20", "--train_batch_size", "32", "--width", "16", "--depth", "1"]
QUICK += ["--matching_steps", "10"]


def test_distill_adds_a_student_and_reports(
    run: Path, pipeline: MNIFPipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("latent_prior.commands.distill._COMPARED", 64)
    command = ["distill", "--run", str(run), *QUICK, "--teacher_steps", "8", "--compile", "off"]
    assert main(command) == 0
    index = json.loads((run / "model/model_index.json").read_text())
    assert index["student"] == ["latent_prior.denoisers", "ResMLPDenoiser"]
    assert index["student_scheduler"] == ["diffusers", "DDIMScheduler"]
    loaded = MNIFPipeline.from_pretrained(run / "model")
    assert loaded.student.config.distilled_steps == [1, 2, 4]
    assert torch.equal(loaded.student.latent_mean, pipeline.denoiser.latent_mean)
    distances = json.loads((run / "metrics.json").read_text())["distill"]["energy_distance"]
    teacher, student = ({f"{name}_{k}" for k in (1, 2, 4)} for name in ("teacher", "student"))
    assert distances.keys() == teacher | student | {"teacher_8", "gaussian", "held_out"}
    assert distances["gaussian"] < distances["teacher_8"]  # the latents are Gaussian, the teacher knows nothing
    capsys.readouterr()
    assert main(command) == 0
    assert "nothing to do" in capsys.readouterr().out
    add_prior(run / "model", pipeline)  # a new teacher: the student of the old one goes
    assert not (run / "model/student").exists()
    assert json.loads((run / "model/model_index.json").read_text()).get("student", [None])[0] is None


def test_a_model_that_was_rounded_gets_a_student(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its decoder is not to the last bit what its prior was trained for; that is no reason to fail at the end."""
    monkeypatch.setattr("latent_prior.commands.distill._COMPARED", 64)
    model = run / "model"
    MNIFPipeline.from_pretrained(model, torch_dtype=torch.float16).to(dtype=torch.float32).save_pretrained(model)
    rounded = load_component(MNIFModel, model, "decoder")
    table = LatentTable.load(run / "latents.safetensors")
    assert rounded.fingerprint() != table.fingerprint
    replace(table, fingerprint=rounded.fingerprint()).save(run / "latents.safetensors")
    assert main(["distill", "--run", str(run), *QUICK, "--teacher_steps", "4", "--compile", "off"]) == 0
    assert load_pipeline(model).student.config.distilled_steps == [1, 2, 4]


@pytest.mark.parametrize(("num_pairs", "steps", "known"), [(60, 300, True), (2000, 20, False)])
def test_a_student_that_knows_its_pairs_by_heart_is_told_of(
    num_pairs: int,
    steps: int,
    known: bool,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("latent_prior.commands.distill._COMPARED", 64)
    flags = ["--num_pairs", str(num_pairs), "--max_train_steps", str(steps), "--validation_steps", str(steps)]
    command = ["distill", "--run", str(run), *flags, "--width", "64", "--depth", "2", "--train_batch_size", "32"]
    assert main([*command, "--matching_steps", "0", "--compile", "off"]) == 0
    assert (f"it wants a larger --num_pairs than {num_pairs}" in capsys.readouterr().out) == known
    (row,) = (row for row in read_metrics_log(run / "metrics.jsonl") if "validation_loss" in row)
    assert (row["validation_loss_train"] < 0.6 * row["validation_loss"]) == known


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--student_steps", "0", "2"], "--student_steps 0: numbers of steps from 1 to 1000"),
        (["--teacher_steps", "0"], "--teacher_steps 0: must be at least 1"),
        (["--teacher_steps", "10"], "--teacher_steps 10: must be a multiple of each of --student_steps, also of 4"),
        (["--num_pairs", "1"], "--num_pairs 1: at least one"),
    ],
)
def test_bad_flags_get_one_line(run: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", "--run", str(run), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (run / "pairs").exists()


def test_a_run_without_a_prior(pipeline: MNIFPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_component(tmp_path / "run/model", "decoder", pipeline.decoder)
    assert main(["distill", "--run", f"{tmp_path}/run"]) == 2
    assert "has no denoiser; `mnif prior` makes it" in capsys.readouterr().err
