"""Students: what they learn, how they stand in the model folder, and the distance they are judged by."""

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import latent_prior.pairs
from latent_prior.denoiser import LatentDenoiser
from latent_prior.distill import DistillationLoss
from latent_prior.energy import energy_distance
from latent_prior.noise import initial_noise
from latent_prior.objective import noise_levels, sampling_scheduler, student_scheduler
from latent_prior.pairs import draw, teacher_pairs
from latent_prior.pipeline import MNIFPipeline
from latent_prior.train import add_prior
from mnif.cli import main
from mnif.latents import LatentTable
from mnif.model_folder import save_component


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


class Exact(LatentDenoiser):
    """A student that knows: the teacher's sample is the rest of the noise's line through a given map."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor | float) -> torch.Tensor:
        return self.answer


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_chain_ends_at_its_last_guess_and_the_pipeline_draws_the_same(pipeline: MNIFPipeline, steps: int) -> None:
    loss = DistillationLoss(pipeline.denoiser.eval(), (1, 2, 4))
    noise = torch.randn(5, 12)
    with torch.no_grad():
        *_, guess = loss.guesses(noise, steps)
    drawn = MNIFPipeline(pipeline.decoder, pipeline.denoiser, student_scheduler())
    drawn.set_progress_bar_config(disable=True)
    latents = drawn(latents=noise, num_inference_steps=steps, output_type="latent").images
    torch.testing.assert_close(latents, pipeline.denoiser.to_latents(guess), atol=1e-5, rtol=1e-5)


def test_an_exact_student_has_no_loss_at_any_length() -> None:
    student = Exact(latent_dim=4, width=8, depth=1)
    noise, student.answer = torch.randn(6, 4), torch.randn(6, 4)
    loss = DistillationLoss(student, (1, 2, 4))
    for steps in (1, 2, 4):
        assert [float((guess - student.answer).abs().max()) for guess in loss.guesses(noise, steps)] == [0.0] * steps
    assert loss(noise, student.answer).item() == 0
    assert loss(noise, student.answer + 2).item() == pytest.approx(4)


def exact_teacher(noise: torch.Tensor, steps: int) -> torch.Tensor:
    """Samples of a mixture of five Gaussians in the plane, whose posterior mean of x₀ is known in closed form."""
    means = torch.tensor([[-1.2, -1.0], [1.0, 1.3], [-0.8, 1.0], [1.3, -1.0], [0.0, 0.0]], dtype=torch.float64)
    scheduler, variance, state = sampling_scheduler("x0"), 0.15**2, noise
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        alpha, sigma = (level.double() for level in noise_levels("x0", timestep[None]))
        spread = alpha**2 * variance + sigma**2
        apart = state.double()[:, None] - alpha * means
        share = (-apart.square().sum(dim=-1) / (2 * spread)).softmax(dim=-1)
        clean = (share[..., None] * (means + alpha * variance / spread * apart)).sum(dim=1)
        state = scheduler.step(clean.to(noise), timestep, state).prev_sample
    return state


def test_students_of_an_exact_teacher_reach_it_and_gain_from_more_steps() -> None:
    torch.manual_seed(0)
    noise = torch.randn(4096, 2)
    samples = exact_teacher(noise, 20)
    student = LatentDenoiser(latent_dim=2, width=16, depth=2)
    loss = DistillationLoss(student, (1, 4))
    optimizer = torch.optim.Adam(student.parameters(), lr=6e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        rows = torch.randint(len(noise), (96,))
        optimizer.zero_grad()
        loss(noise[rows], samples[rows]).backward()
        optimizer.step()
        schedule.step()
    unseen = torch.randn(1000, 2)
    data = exact_teacher(torch.randn(1000, 2), 20)
    distances, errors = {}, {}
    for steps in (1, 4):
        with torch.no_grad():
            *_, guess = loss.guesses(unseen, steps)
        errors[steps] = (guess - exact_teacher(unseen, 20)).square().mean().item()
        distances[steps] = energy_distance(guess, data)
    assert errors[4] < errors[1] < 0.02
    assert max(distances.values()) < 0.02 < 0.2 * energy_distance(exact_teacher(unseen, 1), data)


def test_pairs_are_kept_continued_and_belong_to_their_teacher(
    pipeline: MNIFPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_prior.pairs, "_PART", 4)
    drawn: list[range] = []

    def counted(*arguments: object) -> torch.Tensor:
        drawn.append(arguments[2])
        return draw(*arguments)

    monkeypatch.setattr(latent_prior.pairs, "draw", counted)
    save_component(tmp_path / "model", "denoiser", pipeline.denoiser)

    def pairs(count: int, steps: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
        return teacher_pairs(tmp_path / "pairs", tmp_path / "model", pipeline, count, 3, steps, Accelerator(cpu=True))

    noise, samples = pairs(6)
    assert (len(noise), len(samples), len(drawn)) == (6, 6, 2)
    more_noise, more = pairs(10)
    assert len(drawn) == 3  # only the third part is new
    assert torch.equal(more[:6], samples)
    assert torch.equal(more_noise[:6], noise)
    latents = pipeline(latents=noise, num_inference_steps=2, output_type="latent").images
    torch.testing.assert_close(pipeline.denoiser.to_latents(samples), latents, atol=1e-5, rtol=1e-5)
    assert not set(map(tuple, noise.tolist())) & set(map(tuple, initial_noise(3, range(200), 12).tolist()))
    pairs(4, steps=1)
    assert len(drawn) == 4  # another search: what was kept is of no use


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


def test_distill_adds_a_student_and_reports(
    run: Path, pipeline: MNIFPipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("latent_prior.distill._COMPARED", 64)
    command = ["distill", "--run", str(run), *QUICK, "--teacher_steps", "5", "--compile", "off"]
    assert main(command) == 0
    index = json.loads((run / "model/model_index.json").read_text())
    assert index["student"] == ["latent_prior.denoiser", "LatentDenoiser"]
    assert index["student_scheduler"] == ["diffusers", "DDIMScheduler"]
    loaded = MNIFPipeline.from_pretrained(run / "model")
    assert loaded.student.config.distilled_steps == [1, 2, 4]
    assert torch.equal(loaded.student.latent_mean, pipeline.denoiser.latent_mean)
    distances = json.loads((run / "metrics.json").read_text())["distill"]["energy_distance"]
    teacher, student = ({f"{name}_{k}" for k in (1, 2, 4)} for name in ("teacher", "student"))
    assert distances.keys() == teacher | student | {"teacher_5", "gaussian", "held_out"}
    assert distances["gaussian"] < distances["teacher_5"]  # the latents are Gaussian, the teacher knows nothing
    capsys.readouterr()
    assert main(command) == 0
    assert "nothing to do" in capsys.readouterr().out
    add_prior(run / "model", pipeline)  # a new teacher: the student of the old one goes
    assert not (run / "model/student").exists()
    assert json.loads((run / "model/model_index.json").read_text()).get("student", [None])[0] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--student_steps", "0", "2"], "--student_steps 0: numbers of steps from 1 to 1000"),
        (["--teacher_steps", "0"], "--teacher_steps 0: must be at least 1"),
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
