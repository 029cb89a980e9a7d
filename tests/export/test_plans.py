"""What stands between a file called a plan and TensorRT: nothing unsealed, changed, foreign or stale gets through."""

import ctypes
import json
import os
import shutil
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.commands.export import ExportArguments, export_bundle
from export.device import backends, build, cuda, sample, tensorrt, tensorrt_graph
from export.device.bundle import ENGINES, BundleError, BundleFolder
from export.device.cuda import Cuda, CudaError
from export.device.plans import PlanRefused, plan_key, read_plan, sidecar_path, write_plan
from export.device.runtime import Decoder, Encoder, Sampler, load_bundle
from mnif.cli import main
from tests.conftest import small_decoder, small_pipeline
from tests.fakes.cuda import RecordedDriver
from tests.fakes.tensorrt import VERSIONS, recorded_tensorrt


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MNIF_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


class Board:
    """A machine with a recorded GPU and a recorded TensorRT, and a bundle on it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self._patch = folder, monkeypatch
        self.move()

    def move(self, version: str = "10.3.0", **driver: Any) -> None:
        """To another TensorRT or GPU."""
        self.driver, self.tensorrt = RecordedDriver(**driver), recorded_tensorrt(version)
        self.tensorrt.on_stream = self.driver.on_stream
        for module in (build, cuda):
            self._patch.setattr(module, "find_gpu", lambda: (Cuda(self.driver), Cuda(self.driver).gpu()))
        self._patch.setattr(tensorrt_graph, "Cuda", lambda: Cuda(self.driver))
        for module in (build, tensorrt, tensorrt_graph):
            self._patch.setattr(module, "find_builder", lambda wanted="auto": self.tensorrt)

    def build(self, *flags: str) -> int:
        return main(["build", "--bundle", str(self.folder), *flags])

    def plan(self, name: str) -> Path:
        return self.folder / ENGINES / f"{name}.plan"


@pytest.fixture
def board(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    return Board(Path(shutil.copytree(exported, tmp_path / "bundle")), monkeypatch)


@pytest.mark.parametrize("version", VERSIONS)
def test_engines_answer_as_onnx_runtime_does(board: Board, version: str) -> None:
    board.move(version)
    assert board.build("--graphs", "decoder", "encoder", "sampler_1", "--batch_sizes", "1", "4") == 0
    ours, theirs = load_bundle(board.folder, "tensorrt"), load_bundle(board.folder, "onnxruntime")
    for batch in (1, 3, 4, 3, 1):
        found, expected = (Sampler(each, "fp32", 1)(batch, seed=batch) for each in (ours, theirs))
        np.testing.assert_allclose(found, expected, atol=1e-5)
    random = np.random.default_rng(0).standard_normal((2, 4, 2, 6)).astype(np.float32)
    np.testing.assert_allclose(Decoder(ours)(random), Decoder(theirs)(random), atol=1e-5)
    values = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    found, expected = (Encoder(each)(values)[:5] for each in (ours, theirs))
    for answer, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(answer, wanted, atol=1e-5)


def test_one_graph_launch_a_call_and_nothing_made_twice(board: Board) -> None:
    assert board.build("--graphs", "decoder") == 0
    run = tensorrt_graph.load_tensorrt_graph(BundleFolder(board.folder), "decoder")
    arrays = {"coefficients": np.ones((1, 4, 2, 6), np.float32)}
    first = run(arrays)[0]
    board.driver.calls.clear()
    np.testing.assert_array_equal(run(arrays)[0], first)
    assert board.driver.calls == [
        "cuEventRecord",
        "cuGraphLaunch",
        "cuEventRecord",
        "cuStreamSynchronize",
        "cuEventElapsedTime",
    ]
    assert run.device_milliseconds == 0.25
    run({"coefficients": np.ones((2, 4, 2, 6), np.float32)})  # another profile: the first keeps its graph
    run({"coefficients": np.ones((3, 4, 2, 6), np.float32)})  # the same profile, another shape: captured anew
    board.driver.calls.clear()
    np.testing.assert_array_equal(run(arrays)[0], first)
    assert "cuStreamBeginCapture_v2" not in board.driver.calls
    assert "cuMemAlloc_v2" not in board.driver.calls


def test_without_a_cuda_graph_kernels_are_started_one_by_one(board: Board, caplog: pytest.LogCaptureFixture) -> None:
    board.move(captures=False)
    assert board.build("--graphs", "decoder") == 0
    arrays = {"coefficients": np.random.default_rng(1).standard_normal((2, 4, 2, 6)).astype(np.float32)}
    folder = BundleFolder(board.folder)
    answers = [tensorrt_graph.load_tensorrt_graph(folder, "decoder", wish)(arrays)[0] for wish in (True, False)]
    np.testing.assert_array_equal(*answers)
    assert "no CUDA graph: the CUDA driver refuses cuStreamEndCapture: operation not supported" in caplog.text


def test_a_batch_no_profile_takes_is_one_line(board: Board) -> None:
    assert board.build("--graphs", "decoder") == 0
    with pytest.raises(BundleError, match=r"no profile of the plan takes coefficients \[1000, 4, 2, 6\]"):
        load_bundle(board.folder, "tensorrt").run("decoder", np.zeros((1000, 4, 2, 6)))


def test_what_is_up_to_date_is_kept(board: Board, capsys: pytest.CaptureFixture[str], state: Path) -> None:
    assert board.build("--graphs", "decoder", "sampler_1") == 0
    assert "2 built, 0 up to date" in capsys.readouterr().out
    (cache,) = state.glob("timing-*.cache")
    assert cache.read_bytes() == b"+1+1"
    before = board.plan("decoder").stat().st_mtime_ns
    assert board.build("--graphs", "decoder", "sampler_1") == 0
    assert "0 built, 2 up to date" in capsys.readouterr().out
    assert board.plan("decoder").stat().st_mtime_ns == before
    assert board.build("--graphs", "decoder", "--batch_sizes", "1", "2") == 0
    assert "decoder: building again, because it was built with profiles" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("version", "driver", "reason"),
    [
        ("10.13.3", {}, r"builder version 10\.3\.0, here it is 10\.13\.3"),
        ("10.3.0", {"capability": (11, 0)}, r"compute capability 8\.7, here it is 11\.0"),
        ("10.3.0", {"name": "Orin Nano"}, r"gpu Orin, here it is Orin Nano"),
        ("10.3.0", {"driver": 13000}, r"driver 12\.6, here it is 13\.0"),
    ],
)
def test_a_plan_of_other_times_is_refused_and_rebuilt(
    board: Board, version: str, driver: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert board.build("--graphs", "decoder") == 0
    board.move(version, **driver)
    with pytest.raises(PlanRefused, match=rf"decoder\.plan: it was built (with|for) {reason}; build it again: "):
        load_bundle(board.folder, "tensorrt").graph("decoder")
    assert board.tensorrt.deserialized == []
    assert board.build("--graphs", "decoder") == 0
    assert "decoder: building again, because it was built" in capsys.readouterr().out
    assert load_bundle(board.folder, "tensorrt").graph("decoder").name == "tensorrt"


def test_a_plan_of_another_graph_is_refused(board: Board) -> None:
    assert board.build("--graphs", "decoder", "decoder_mixed") == 0
    for path in (board.plan("decoder"), sidecar_path(board.plan("decoder"))):
        shutil.copyfile(path.with_name(path.name.replace("decoder", "decoder_mixed")), path)
    with pytest.raises(PlanRefused, match="it was built with onnx sha256"):
        load_bundle(board.folder, "tensorrt").graph("decoder")
    assert board.tensorrt.deserialized == []


def spoil_plan(board: Board) -> None:
    content = bytearray(board.plan("decoder").read_bytes())
    content[len(content) // 2] ^= 1
    board.plan("decoder").write_bytes(content)


def truncate_plan(board: Board) -> None:
    board.plan("decoder").write_bytes(board.plan("decoder").read_bytes()[:-1])


def remove_sidecar(board: Board) -> None:
    sidecar_path(board.plan("decoder")).unlink()


def edit_sidecar(board: Board) -> None:
    """Replaces the plan by one's own and makes the hash fit, as someone who means harm would."""
    path = sidecar_path(board.plan("decoder"))
    board.plan("decoder").write_bytes(b"code of mine")
    sidecar = json.loads(path.read_text())
    sidecar["plan"]["sha256"] = "04b60a83c5a9ba5b0dcb1d1b2d1ffdaf0ad4ee4d9c5a6a0e1a1f4f0d8b8b7f7e"
    path.write_text(json.dumps(sidecar))


def come_from_elsewhere(board: Board) -> None:
    """Plan and sidecar are whole, but another machine sealed them."""
    (Path(os.environ["MNIF_STATE"]) / "plan.key").unlink()


def garble_sidecar(board: Board) -> None:
    sidecar_path(board.plan("decoder")).write_text("{")


def empty_sidecar(board: Board) -> None:
    sidecar_path(board.plan("decoder")).write_text("[]")


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (spoil_plan, r"it differs from what was built \(SHA-256\)"),
        (truncate_plan, r"it differs from what was built \(SHA-256\)"),
        (remove_sidecar, r"its sidecar decoder\.plan\.json cannot be read \(No such file or directory\)"),
        (edit_sidecar, "was not written by this user on this machine, or was edited"),
        (come_from_elsewhere, "was not written by this user on this machine, or was edited"),
        (garble_sidecar, "is not JSON"),
        (empty_sidecar, "was not written by this user on this machine, or was edited"),
    ],
)
def test_harm_is_refused_before_tensorrt_sees_it(
    board: Board, tmp_path: Path, harm: Any, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert board.build() == 0
    harm(board)
    with pytest.raises(PlanRefused, match=reason):
        load_bundle(board.folder, "tensorrt").graph("decoder")
    assert board.tensorrt.deserialized == []
    capsys.readouterr()
    flags = ["--bundle", str(board.folder), "--backend", "tensorrt", "--output_dir", str(tmp_path / "out")]
    if harm is come_from_elsewhere:
        assert sample.main(flags) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert backends.load_graph(BundleFolder(board.folder), "decoder").name == "onnxruntime"
    assert board.build("--graphs", "decoder") == 0
    assert load_bundle(board.folder, "tensorrt").graph("decoder").name == "tensorrt"


def test_a_tampered_graph_is_not_built(board: Board, capsys: pytest.CaptureFixture[str]) -> None:
    path = board.folder / "onnx" / "decoder.onnx"
    path.write_bytes(path.read_bytes()[:-30])
    assert board.build("--graphs", "decoder") == 2
    assert "decoder.onnx: differs from what was exported" in capsys.readouterr().err
    assert not board.plan("decoder").exists()


def test_a_build_that_dies_leaves_the_old_plan(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    assert board.build("--graphs", "decoder") == 0
    whole = board.plan("decoder").read_bytes()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device", str(board.plan("decoder")))

    monkeypatch.setattr(Path, "replace", full)
    assert board.build("--graphs", "decoder", "--force") == 2
    monkeypatch.undo()
    assert board.plan("decoder").read_bytes() == whole
    assert not list(board.plan("decoder").parent.glob(".*.tmp"))


def test_plans_outlive_another_export_as_long_as_their_graphs_are_the_same(
    board: Board, capsys: pytest.CaptureFixture[str]
) -> None:
    assert board.build("--graphs", "decoder", "sampler_1") == 0
    before = board.plan("decoder").read_bytes()
    options = ExportArguments(
        model=board.folder,
        output_dir=board.folder,
        num_baked=0,
        num_inference_steps=[1],
        resolution=[15],
        sampler_precision=["fp32"],
        compile_rtx="off",
    )
    export_bundle(small_pipeline(small_decoder()), options)
    capsys.readouterr()
    assert board.build("--graphs", "decoder", "sampler_1") == 0
    assert "0 built, 2 up to date" in capsys.readouterr().out
    export_bundle(small_pipeline(small_decoder()), replace(options, resolution=[14]))
    assert board.plan("decoder").read_bytes() == before
    with pytest.raises(PlanRefused, match="it was built with onnx sha256"):
        load_bundle(board.folder, "tensorrt").graph("decoder")
    assert board.build("--graphs", "decoder", "sampler_1") == 0
    assert "2 built, 0 up to date" in capsys.readouterr().out


def test_what_a_killed_build_left_goes_with_the_next(board: Board) -> None:
    engines = board.folder / ENGINES
    engines.mkdir()
    left = [".decoder.plan.12.tmp", ".decoder.plan.json.12.tmp", ".decoder.plan.log.12.tmp"]
    others = [".decoder.plan.mine.tmp", ".decoder_mixed.plan.12.tmp"]
    for name in (*left, *others):
        (engines / name).write_text("half")
    assert board.build("--graphs", "decoder") == 0
    assert sorted(path.name for path in engines.glob(".*")) == sorted(others)


def test_the_key_is_this_users_alone(tmp_path: Path, state: Path) -> None:
    write_plan(tmp_path / "a.plan", b"plan", {"gpu": "Orin"}, {}, ["line"])
    assert stat.S_IMODE((state / "plan.key").stat().st_mode) == 0o600
    assert read_plan(tmp_path / "a.plan", {"gpu": "Orin"}) == b"plan"
    assert (tmp_path / "a.plan.log").read_text() == "line\n"
    (state / "plan.key").write_bytes(b"short")
    with pytest.raises(BundleError, match=r"plan\.key: not a key"):
        read_plan(tmp_path / "a.plan", {})


def test_keys_follow_every_fact() -> None:
    facts = {"gpu": "Orin", "builder_version": "10.3.0", "profiles": [1]}
    keys = {plan_key(facts), *(plan_key({**facts, name: "other"}) for name in facts)}
    assert len(keys) == 4
    assert plan_key(dict(reversed(facts.items()))) == plan_key(facts)


def test_no_driver_and_no_device_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", none)
    with pytest.raises(CudaError, match="no GPU: there is no CUDA driver"):
        Cuda()
    driver = RecordedDriver()
    driver.cuInit = lambda flags: 100  # type: ignore[method-assign]
    with pytest.raises(CudaError, match=r"no GPU: the CUDA driver finds none \(cuInit gives 100\)"):
        Cuda(driver)


def test_the_driver_is_asked_for_device_0() -> None:
    gpu = Cuda(RecordedDriver("NVIDIA Thor", (11, 0), 13020)).gpu()
    assert gpu == ("NVIDIA Thor", "11.0", "13.2", 8 << 30)


def test_plain_tensorrt_wants_a_gpu(board: Board, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def none() -> None:
        raise CudaError("no GPU: none")

    monkeypatch.setattr(build, "find_gpu", none)
    assert board.build() == 2
    assert "no GPU: none; TensorRT builds on the device alone" in capsys.readouterr().err
