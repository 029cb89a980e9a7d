"""The sample in examples/cpp: built here, its noise is NumPy's and its files are those of device/sample.py."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from export.device.sample import main as sample
from latent_prior.sampling import initial_noise

HERE = Path(__file__).parents[2] / "examples/cpp"

pytestmark = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("c++") is None or not (HERE / "onnxruntime/include").is_dir(),
    reason="needs CMake, a C++ compiler and `bash examples/cpp/get_onnxruntime.sh`",
)


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = tmp_path_factory.mktemp("build")
    for command in (["cmake", "-S", HERE, "-B", build], ["cmake", "--build", build]):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning" not in done.stderr
    return build / "sample"


def run(program: Path, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *map(str, words)], capture_output=True, text=True, check=False)


@pytest.fixture
def echo(tmp_path: Path) -> Path:
    """A graph that gives its noise back."""
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 200_000]) for name in ("noise", "latents")
    ]
    graph = helper.make_graph([helper.make_node("Identity", ["noise"], ["latents"])], "echo", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save_model(model, tmp_path / "echo.onnx")
    return tmp_path / "echo.onnx"


@pytest.mark.parametrize(("seed", "index"), [(0, 0), (7, 12), (2**32, 2**32 - 1), (10**17, 2**40 + 3)])
def test_noise_is_that_of_numpy(program: Path, echo: Path, tmp_path: Path, seed: int, index: int) -> None:
    done = run(program, echo, tmp_path / "out", "--num", 1, "--seed", seed, "--start", index)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "out" / f"{index:06d}.npy")
    (expected,) = initial_noise(seed, [index], 200_000)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=0, rtol=2e-7)  # a logarithm in the tail may round differently
    assert (found != expected).mean() < 1e-5


@pytest.mark.parametrize("graph", ["sampler_3", "sampler_3_mixed"])
def test_pictures_are_those_of_the_device(program: Path, exported: Path, tmp_path: Path, graph: str) -> None:
    flags = ["--seed", "5", "--start", "3", "--num", "20"]  # a batch of 16, and one of 4
    done = run(program, exported / f"onnx/{graph}.onnx", tmp_path / "cpp", *flags)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'cpp'}: 20 drawn\n"), done.stderr
    chosen = ["--precision", "mixed" if graph.endswith("mixed") else "fp32", "--steps", "3"]
    chosen += ["--backend", "onnxruntime", "--output_dir", str(tmp_path / "python")]
    assert sample(["--bundle", str(exported), *flags, *chosen]) == 0
    files = sorted((tmp_path / "python").iterdir())
    assert [path.stem for path in files] == [f"{index:06d}" for index in range(3, 23)]
    assert sorted(path.name for path in (tmp_path / "cpp").iterdir()) == [f"{path.stem}.ppm" for path in files]
    for path in files:
        with Image.open(tmp_path / "cpp" / f"{path.stem}.ppm") as found, Image.open(path) as expected:
            np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
            assert np.asarray(found).std() > 5


@pytest.mark.parametrize(("kept", "ending", "mode"), [(1, "pgm", "L"), (3, "ppm", "RGB"), (4, "pam", None)])
def test_channels_are_cut(program: Path, tmp_path: Path, kept: int, ending: str, mode: str | None) -> None:
    ends = [helper.make_tensor_value_info("noise", TensorProto.FLOAT, ["batch", 24])]
    ends.append(helper.make_tensor_value_info("values", TensorProto.FLOAT, ["batch", 2, 3, 4]))
    shape = helper.make_tensor("shape", TensorProto.INT64, [4], [-1, 2, 3, 4])
    graph = helper.make_graph([helper.make_node("Reshape", ["noise", "shape"], ["values"])], "g", *[[e] for e in ends])
    graph.initializer.append(shape)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save_model(model, tmp_path / "padded.onnx")
    done = run(program, tmp_path / "padded.onnx", tmp_path, "--num", 1, "--channels", kept)
    assert done.returncode == 0, done.stderr
    values = initial_noise(0, range(1), 24).reshape(2, 3, 4)[..., :kept]
    expected = np.round(np.clip(values, -1, 1) * np.float32(127.5) + np.float32(127.5)).astype(np.uint8)
    content = (tmp_path / f"000000.{ending}").read_bytes()
    assert content.endswith(expected.tobytes())
    if mode is not None:
        with Image.open(tmp_path / f"000000.{ending}") as image:
            assert image.mode == mode


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "usage: sample GRAPH.onnx OUTPUT_DIR"),
        (["a", "b", "--num", "0"], "--num 0: must be at least 1"),
        (["a", "b", "--seed", "-1"], "--seed -1: a whole number"),
        (["a", "b", "--steps", "1"], "--steps: no such flag"),
        (["no.onnx", "out"], "no.onnx"),
        (["onnx/decoder.onnx", "out"], "no sampler, which takes noise"),
        (["onnx/sampler_1.onnx", "out", "--channels", "5"], "pictures of 1, 3 or 4 channels"),
    ],
)
def test_mistakes_are_one_line(
    program: Path, exported: Path, tmp_path: Path, words: list[str], complaint: str
) -> None:
    words = [str(tmp_path / "out") if word == "out" else word for word in words]
    done = subprocess.run([program, *words], cwd=exported, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert complaint in done.stderr
    assert not list(tmp_path.rglob("0*"))
