"""Distribution matching: where its gradients lead, and that a run that was stopped ends as one that was not."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from latent_prior.denoisers import ResMLPDenoiser
from latent_prior.diffusion import OBJECTIVES, Objective, noise_levels
from latent_prior.distillation import energy_distance
from latent_prior.distribution_matching import DistributionMatchingLoss, student_paths
from mnif.cli import main
from mnif.data.batches import InstanceGenerator, instance_keys
from mnif.training.loop import TrainLoop
from tests.latent_prior.test_distill import QUICK, Mixture, run

__all__ = ["run"]  # the fixture


def drawn_of_mixture(count: int) -> Tensor:
    return Mixture.means[torch.randint(5, (count,))].float() + Mixture.std * torch.randn(count, 2)


def matching(
    objective: Objective = "x0", steps: tuple[int, ...] = (1,), auxiliary: ResMLPDenoiser | None = None
) -> DistributionMatchingLoss:
    """The loss of a small student of the mixture."""
    torch.manual_seed(0)
    student = ResMLPDenoiser(latent_dim=2, width=16, depth=2, time_width=16)
    if auxiliary is None:
        auxiliary = ResMLPDenoiser(latent_dim=2, width=32, depth=2, time_width=32)
    return DistributionMatchingLoss(student, Mixture(objective), auxiliary, objective, steps, drawn_of_mixture(4000))


def trained(loss: DistributionMatchingLoss, steps: int) -> None:
    """Both learn, as `mnif distill` lets them."""
    optimizers = [
        torch.optim.Adam(parameters, lr=6e-3, betas=(0.0, 0.99))
        for parameters in (loss.student.parameters(), loss.following_parameters())
    ]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) for optimizer in optimizers]
    for step in range(steps):
        torch.manual_seed(step)
        loss(instance_keys(0, step, torch.arange(192))).backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def test_paths_lead_by_every_timestep_of_every_number_of_steps() -> None:
    assert student_paths((1,)) == [(999,)]
    assert student_paths((4, 1, 2)) == [(999,), (999, 499), (999, 749), (999, 749, 499), (999, 749, 499, 249)]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_is_predicted_gives_the_clean_latent_back(objective: Objective) -> None:
    clean, noise = torch.randn(2, 50, 3, dtype=torch.float64)
    alpha, sigma = (level.double()[:, None] for level in noise_levels(objective, torch.arange(20, 970, 19)))
    prediction = OBJECTIVES[objective]
    target = prediction.target(clean, noise, alpha, sigma)
    torch.testing.assert_close(prediction.clean(alpha * clean + sigma * noise, target, alpha, sigma), clean)


def test_a_student_whose_follower_agrees_with_the_teacher_stays() -> None:
    """Samples are only moved where the two differ, and then towards what the teacher guesses."""
    drawn, told = 2 * torch.randn(300, 2), torch.zeros(300, 128)  # as wide as the default's embedding of the time
    same = matching(auxiliary=Mixture("x0"))
    assert same._matching(drawn, InstanceGenerator(torch.arange(300)), told).item() == 0
    other = matching(auxiliary=ResMLPDenoiser(latent_dim=2, width=8, depth=1))  # guesses zero everywhere
    moved = drawn.clone().requires_grad_(True)
    other._matching(moved, InstanceGenerator(torch.arange(300)), told).backward()
    assert moved.grad is not None
    towards = -moved.grad
    nearest = Mixture.means[torch.cdist(drawn.double(), Mixture.means).argmin(dim=1)].float()
    far = nearest.norm(dim=1) > 0  # of the mode at zero both say the same
    assert (towards * nearest).sum(dim=1)[far].mean() > 0


def test_the_energy_term_has_the_gradient_of_the_energy_distance() -> None:
    loss = matching()
    loss.latents = loss.latents[:1]  # whichever are drawn
    drawn = torch.randn(40, 2, dtype=torch.float64, requires_grad=True)
    loss.latents = loss.latents.double()
    (found,) = torch.autograd.grad(loss._energy(drawn), drawn)
    apart = torch.cdist(drawn, loss.latents).mean()
    within = torch.nn.functional.pdist(drawn).mean()
    (expected,) = torch.autograd.grad((2 * apart - within) / 2**0.5, drawn)
    torch.testing.assert_close(found, expected)


def test_student_and_follower_do_not_disturb_each_other() -> None:
    loss = matching(steps=(1, 2))
    trained(loss, 3)
    torch.manual_seed(0)
    own = list(loss.student.parameters())
    whole = loss(instance_keys(0, 0, torch.arange(50)))
    gradients = torch.autograd.grad(whole, own, retain_graph=True)
    before = [gradient.clone() for gradient in gradients]
    for parameter in loss.following_parameters():
        assert not any(parameter is other for other in own)
    assert all(gradient.isfinite().all() for gradient in before)
    assert not any("_teacher" in name for name, _ in loss.named_parameters())
    assert not any("latents" in name for name in loss.state_dict() if "latent_" not in name)


@pytest.mark.parametrize("objective", ["x0", "flow"])
def test_students_of_an_exact_teacher_draw_its_mixture_in_one_step(objective: Objective) -> None:
    """They begin with nothing learned of pairs, and see the modes as often as they are."""
    loss, noise = matching(objective), torch.randn(2000, 2)
    assert loss.distances(noise)["energy_distance_1"] > 0.5
    trained(loss, 250)
    with torch.no_grad():
        samples = loss.student.eval()(noise, 999)
    assert energy_distance(samples, drawn_of_mixture(2000)) < 0.012
    shares = torch.cdist(samples.double(), Mixture.means).argmin(dim=1).bincount(minlength=5) / len(samples)
    assert (shares - 0.2).abs().max() < 0.08
    assert loss.distances(noise)["energy_distance_1"] < 0.012


def test_a_stopped_run_ends_as_one_that_was_not(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("latent_prior.commands.distill._COMPARED", 64)
    whole = tmp_path / "whole"
    shutil.copytree(run, whole)
    flags = [*QUICK, "--compile", "off", "--checkpointing_steps", "4", "--validation_steps", "3"]
    assert main(["distill", "--run", str(whole), *flags]) == 0
    steps = TrainLoop._train_step

    def stopping(loop: TrainLoop) -> None:
        if loop.stage == "distill-matching" and loop.progress.step == 7:
            raise KeyboardInterrupt
        steps(loop)

    with monkeypatch.context() as patch:
        patch.setattr(TrainLoop, "_train_step", stopping)
        assert main(["distill", "--run", str(run), *flags]) == 130
    assert main(["distill", "--run", str(run), *flags]) == 0
    assert f"resuming from {run}/checkpoints/distill-matching/checkpoint-4" in capsys.readouterr().out
    weights = "model/student/diffusion_pytorch_model.safetensors"
    assert (run / weights).read_bytes() == (whole / weights).read_bytes()
    assert len(list((run / "checkpoints").iterdir())) == 2


def test_weights_may_stay_between_pairs_and_matching(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latent_prior.commands.distill._COMPARED", 64)

    def learned(name: str, *flags: str) -> dict[str, torch.Tensor]:
        copy = tmp_path / name
        shutil.copytree(run, copy)
        assert main(["distill", "--run", str(copy), *QUICK, "--compile", "off", *flags]) == 0
        return load_file(copy / "model/student/diffusion_pytorch_model.safetensors")

    pairs, matched = learned("pairs", "--matching_steps", "0"), learned("matched")
    between, none = learned("between", "--matching_share", "0.75"), learned("none", "--matching_share", "0")
    for name in pairs:
        assert torch.equal(none[name], pairs[name])
        torch.testing.assert_close(between[name], 0.25 * pairs[name] + 0.75 * matched[name])
    assert any((pairs[name] - matched[name]).abs().max() > 1e-4 for name in pairs)


def test_matching_begins_anew_where_more_is_learned_of_pairs(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("latent_prior.commands.distill._COMPARED", 64)
    command = ["distill", "--run", str(run), *QUICK, "--compile", "off", "--lr_scheduler", "constant"]
    assert main(command) == 0
    assert main([*command, "--max_train_steps", "25"]) == 0
    assert "distill-matching/checkpoint" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--matching_steps", "-1"], "--matching_steps -1: must be at least 0"),
        (["--matching_learning_rate", "-1"], "--matching_learning_rate -1.0: must be at least 0"),
        (["--matching_share", "1.5"], "--matching_share 1.5: must lie between 0 and 1"),
    ],
)
def test_bad_flags_get_one_line(run: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", "--run", str(run), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (run / "checkpoints").exists()
