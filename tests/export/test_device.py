"""The device's side of a bundle runs from the bundle alone, and under the oldest Python a board has."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import export
from export.bundle import COMMANDS
from export.device.runtime import Sampler, load_bundle
from mnif.utils.pixels import to_uint8

HERE = Path(export.__file__).parent
PACKAGE = [HERE / "__init__.py", *sorted((HERE / "device").glob("*.py"))]
SOURCES = [*PACKAGE, HERE / "device_entry.py"]


def run(bundle: Path, python: str, script: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """A command of the bundle in an environment that knows nothing of this project."""
    environment = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    environment |= {"MNIF_STATE": str(bundle.parent / "state"), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [python, f"device/{script}.py", *flags]
    return subprocess.run(command, cwd=bundle, env=environment, capture_output=True, text=True, check=False)


def old_pythons() -> list[str]:
    """Interpreters older than this one that have NumPy and ONNX Runtime: OLD_PYTHON, or none."""
    return [path for path in os.environ.get("OLD_PYTHON", "").split(os.pathsep) if path]


def test_the_copies_are_this_packages_files(exported: Path) -> None:
    copies = sorted((exported / "device" / "export").rglob("*.py"))
    assert copies == sorted(exported / "device" / "export" / path.relative_to(HERE) for path in PACKAGE)
    for path in PACKAGE:
        assert (exported / "device" / "export" / path.relative_to(HERE)).read_bytes() == path.read_bytes()
    assert {path.stem for path in (exported / "device").glob("*.py")} == set(COMMANDS)
    files = json.loads((exported / "manifest.json").read_text())["files"]
    assert {f"device/{name}.py" for name in COMMANDS} <= set(files)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_sources_are_python_3_8(path: Path) -> None:
    ast.parse(path.read_text(), feature_version=(3, 8))


def test_nothing_newer_than_python_3_8_is_called() -> None:
    pytest.importorskip("vermin")
    command = [str(Path(sys.executable).with_name("vermin")), "--no-tips", "-t=3.8-", "--violations"]
    done = subprocess.run([*command, *map(str, SOURCES)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_modules_import_the_standard_library_numpy_and_each_other() -> None:
    """Backends are imported inside the functions that need them, as the evaluator is, which needs onnx."""
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [] if node.level else [node.module or ""]
            for name in names:
                package = name.partition(".")[0]
                allowed = package in sys.stdlib_module_names or package == "numpy"
                allowed |= path.stem == "reference_evaluator" and package == "onnx"
                assert allowed, f"{path.name} imports {name}"


@pytest.mark.parametrize("python", [sys.executable, *old_pythons()])
def test_pictures_from_the_bundle_alone(exported: Path, tmp_path: Path, python: str) -> None:
    done = run(exported, python, "sample", "--num", "16", "--seed", "0", "--output_dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "16 pictures drawn" in done.stdout
    assert "runs in " in done.stderr
    images = np.stack([np.asarray(Image.open(path)) for path in sorted(tmp_path.iterdir())]).astype(int)
    expected = to_uint8(torch.from_numpy(Sampler(load_bundle(exported))(16, seed=0)))
    assert np.abs(images - expected).max() <= 1


@pytest.mark.parametrize("python", [sys.executable, *old_pythons()])
def test_verify_and_bench_from_the_bundle_alone(exported: Path, tmp_path: Path, python: str) -> None:
    done = run(exported, python, "verify", "--backends", "onnxruntime", "--output", str(tmp_path / "verify.json"))
    assert done.returncode == 0, done.stderr
    assert all(row["passed"] for row in json.loads((tmp_path / "verify.json").read_text()))
    done = run(exported, python, "bench", "--rounds", "2", "--graphs", "decoder", "--backends", "onnxruntime")
    assert done.returncode == 0, done.stderr
    assert "decoder  onnxruntime" in done.stdout


@pytest.mark.parametrize("python", [sys.executable, *old_pythons()])
def test_build_from_the_bundle_alone_or_one_line(exported: Path, python: str) -> None:
    done = run(exported, python, "build", "--graphs", "nothing")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("device/build.py: ")


def test_no_heavy_package_is_loaded(exported: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, 'device'); from export.device.runtime import Sampler, load_bundle; "
        "Sampler(load_bundle('.'))(1); "
        "print(sorted({'torch', 'diffusers', 'PIL', 'mnif', 'onnx', 'openvino', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=exported, capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr
