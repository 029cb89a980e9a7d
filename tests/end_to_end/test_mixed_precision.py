"""bfloat16 beside float32, stage by stage, within the bounds that docs/gpu.md states; and who says which it is."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.commands import launch
from accelerate.commands.config import config_args
from accelerate.commands.config.default import write_basic_config
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from torch import Tensor, nn

from latent_prior.diffusion import DenoisingLoss, objective_of
from latent_prior.distillation import DistillationLoss
from latent_prior.hub import model_folder
from latent_prior.pipeline import MNIFPipeline, load_pipeline
from latent_prior.sampling import sample_latents
from mnif.cli import main
from mnif.latents.embedding import LatentEmbedding
from mnif.latents.inner_loop import InnerLoop
from mnif.models.encoders import PatchEncoder
from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import psnr
from mnif.signals.image import Image
from mnif.training import loop
from mnif.training.methods import AutoDecoderMethod, EncoderMethod, LearningMethod, MetaMethod
from mnif.utils.json_files import read_json

pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")

ROW = re.compile(r"^\| (?P<stage>[^|]+) \| (?P<figure>[^|]+) \| [^|]+ \| (?P<bound>[\d.]+) (?:%|dB) \|$", re.MULTILINE)
PAGE = (Path(__file__).parents[2] / "docs/gpu.md").read_text()
BOUNDS = {(row["stage"].strip(), row["figure"].strip()): float(row["bound"]) for row in ROW.finditer(PAGE)}


def check(stage: str, **found: float) -> None:
    """Compares figures with their bounds on the page: percents at most, decibels at least."""
    for figure, value in found.items():
        bound = BOUNDS[stage, figure]
        print(f"{stage}: {figure} {value:.4g}, bound {bound:g}")
        assert value >= bound if "picture" in figure else value <= bound, f"{stage}: {figure} {value:.4g}"


def percent(found: Tensor, expected: Tensor) -> float:
    """The norm of what they differ by over that of the expected one."""
    return 100 * ((found.float() - expected).norm() / expected.norm()).item()


def step(module: nn.Module, **batch: Tensor) -> dict[str, float]:
    """By how many percent loss and gradient of a step differ, as Accelerate has it: backward outside of autocast."""
    found = []
    for is_mixed in (False, True):
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
            loss = module(**batch)
        loss.float().backward()
        gradients = [parameter.grad.flatten() for parameter in module.parameters() if parameter.grad is not None]
        found.append((loss.detach().float()[None], torch.cat(gradients)))
    (loss, gradient), (mixed_loss, mixed_gradient) = found
    return {"loss": percent(mixed_loss, loss), "gradient": percent(mixed_gradient, gradient)}


def of_encoder(decoder: MNIFModel, signal: Image) -> LearningMethod:
    return EncoderMethod(decoder, signal, PatchEncoder(3, 32, latent_dim=64, width=64), latent_noise=0.1)


def of_auto_decoder(decoder: MNIFModel, signal: Image) -> LearningMethod:
    return AutoDecoderMethod(decoder, signal, LatentEmbedding(8, 64, 8, 0.01, seed=0), latent_regularisation=1e-4)


def of_inner_loop(decoder: MNIFModel, signal: Image) -> LearningMethod:
    return MetaMethod(decoder, signal, InnerLoop(64, steps=3, learning_rate=32.0), second_order=True)


@pytest.mark.parametrize(
    ("stage", "make"),
    [
        ("`fit` by an encoder", of_encoder),
        ("`fit` by auto-decoding", of_auto_decoder),
        ("`fit` by meta-learning", of_inner_loop),
    ],
)
def test_a_step_of_fit(stage: str, make: Callable[[MNIFModel, Image], LearningMethod]) -> None:
    torch.manual_seed(0)
    decoder = MNIFModel(resolution=32, num_bases=32, width=64, depth=2, latent_dim=64, cells=4)
    images = F.interpolate(torch.rand(8, 3, 4, 4), size=32, mode="bicubic").clamp(0, 1).mul(255).byte()
    batch = {"row": torch.arange(8), "key": torch.arange(8), "images": images.permute(0, 2, 3, 1).contiguous()}
    check(stage, **step(make(decoder, Image(32, 3)), **batch))


@pytest.fixture(scope="module")
def trained() -> MNIFPipeline:
    """The model that comes along: pictures of 64×64, a prior and its student."""
    pipeline = load_pipeline(model_folder(Path("avatars")))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def latents(trained: MNIFPipeline) -> Tensor:
    return sample_latents(trained, 0, range(64), 4)


def test_a_step_of_prior_and_of_distill(trained: MNIFPipeline, latents: Tensor) -> None:
    loss = DenoisingLoss(trained.denoiser, objective_of(trained.scheduler))
    check("`prior`", **step(loss, latents=latents, key=torch.arange(64)))
    torch.manual_seed(0)
    clean = trained.denoiser.standardised(latents)[:, None].expand(-1, 2, -1)
    learner = DistillationLoss(trained.student, torch.tensor([999, 499]))
    check("`distill`", **step(learner, states=torch.randn_like(clean), samples=clean, key=torch.arange(64)))


@torch.no_grad()
def test_decoding_and_sampling(trained: MNIFPipeline, latents: Tensor) -> None:
    some, expected = slice(0, 16), trained.decoder(latents)
    with torch.autocast("cpu", torch.bfloat16):
        quality = psnr(trained.decoder(latents).float(), expected)
    check("decoding", **{"mean picture": quality.mean().item(), "worst of 64 pictures": quality.min().item()})
    standardised = trained.denoiser.standardised
    for stage, steps, use_student in (
        ("sampling, prior in 20 steps", 20, False),
        ("sampling, student in 1 step", 1, True),
    ):
        whole = sample_latents(trained, 0, range(64), steps, use_student=use_student)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = sample_latents(trained, 0, range(64), steps, use_student=use_student)
        drawn = psnr(trained.decoder(mixed.float()[some]), trained.decoder(whole[some])).mean().item()
        check(stage, latents=percent(standardised(mixed), standardised(whole)), **{"mean picture": drawn})


class Stopped(Exception):  # noqa: N818
    """A command has come to where it would begin to learn."""


def test_every_command_that_trains_takes_the_precision_of_accelerate(
    picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate launch` says it
    made: list[Accelerator] = []
    make, stops = loop.make_accelerator, False

    def made_accelerator(*arguments: Any) -> Accelerator:
        AcceleratorState._reset_state(reset_partial_state=True)
        made.append(make(*arguments))
        if stops:
            raise Stopped
        return made[-1]

    monkeypatch.setattr(loop, "make_accelerator", made_accelerator)
    is_mixed: list[bool] = []
    for kind in (EncoderMethod, DenoisingLoss):
        forward = kind.forward
        monkeypatch.setattr(
            kind,
            "forward",
            lambda self, *a, forward=forward, **b: (
                is_mixed.append(torch.is_autocast_enabled("cpu")) or forward(self, *a, **b)
            ),
        )
    run, data = f"{tmp_path}/run", ["--data", str(picture_folder)]
    size = ["--resolution", "8", "--cells", "1", "--num_bases", "4", "--width", "8", "--latent_dim", "8"]
    fit = [*data, *size, "--max_train_steps", "2", "--refinement_steps", "0"]
    assert main(["fit", *fit, "--output_dir", run]) == 0
    assert main(["prior", "--run", run, "--max_train_steps", "2", "--width", "16", "--depth", "1"]) == 0
    assert is_mixed == [True] * 4
    stages = read_json(Path(run) / "run.json")
    assert [stages[stage]["arguments"]["mixed_precision"] for stage in ("fit", "prior")] == ["bf16", "bf16"]
    stops = True
    few = ["--max_train_steps", "2"]
    for command in (
        ["distill", "--run", run, *few],
        ["grow", "--model", f"{run}/model", *data, "--output_dir", f"{tmp_path}/grown", *few],
        ["compare-fit", *fit, "--output_dir", f"{tmp_path}/compared"],
        ["pilot", *data, "--resolution", "8", *few, "--output_dir", f"{tmp_path}/pilot"],
    ):
        with pytest.raises(Stopped):
            main(command)
    assert [accelerator.mixed_precision for accelerator in made] == ["bf16"] * 6
    AcceleratorState._reset_state(reset_partial_state=True)


def test_what_accelerate_config_wrote_reaches_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (config_args, launch):
        monkeypatch.setattr(module, "default_config_file", f"{tmp_path}/config.json")
    assert write_basic_config("bf16", f"{tmp_path}/config.json")
    for flags, precision in (
        ([], "bf16"),
        (["--mixed_precision", "no"], "no"),
        (["--cpu"], "no"),
    ):  # for which the file is not read
        parsed = launch.launch_command_parser().parse_args([*flags, "-m", "mnif", "fit"])
        parsed, *_ = launch._validate_launch_command(parsed)
        command, environment = prepare_simple_launcher_cmd_env(parsed)
        assert command[1:] == ["-m", "mnif", "fit"]
        assert environment["ACCELERATE_MIXED_PRECISION"] == precision  # which the commands read
        assert environment["ACCELERATE_USE_CPU"] == str("--cpu" in flags or not torch.cuda.is_available())
