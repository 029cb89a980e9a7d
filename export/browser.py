"""The page of a bundle, ``browser/``: a static site that draws samples with onnxruntime-web."""

import base64
import hashlib
import shutil
from pathlib import Path

import msgspec

from mnif.utils.errors import UserError
from mnif.utils.files import write_json
from mnif.utils.json_files import read_json

_PAGE = Path(__file__).parent / "page"

_BUILDS = {
    "webgpu": ("ort.webgpu.bundle.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm"),
    "wasm": ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"),
}
"""Backend → module and WebAssembly of onnxruntime-web."""

_VERSION = "1.30.0"
_CDN = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{_VERSION}/dist/"
_INTEGRITY = {
    "ort.webgpu.bundle.min.mjs": "sha384-1ntMeyj+z5diX6vBR5h+zlJBPc4iNvhCxE6nlammh8daBYcLBZkzrwDkuJjhwI+f",
    "ort-wasm-simd-threaded.asyncify.wasm": "sha384-EPVDLTxuO663dkZO/pcKJF6vOyyfq/5z9FY1oksN0UWFX2ABH4wDDZQHeNoUleWR",
    "ort.wasm.bundle.min.mjs": "sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG",
    "ort-wasm-simd-threaded.wasm": "sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM",
}
"""SHA-384 of the package's files, as npm has them: a browser refuses others."""


class _NpmPackage(msgspec.Struct):
    """What is looked at in a ``package.json``."""

    name: str
    version: str


def check_onnxruntime_web(package: Path | None) -> None:
    """Refuses a folder that is not npm's onnxruntime-web, before anything is done."""
    if package is None:
        return
    if not (package / "package.json").is_file():
        reason = "no package.json there; `npm install onnxruntime-web` makes node_modules/onnxruntime-web"
        raise UserError(f"--onnxruntime_web {package}: {reason}")
    if (name := read_json(package / "package.json", _NpmPackage).name) != "onnxruntime-web":
        raise UserError(f"--onnxruntime_web {package}: is the npm package {name}, not onnxruntime-web")
    for file in (file for build in _BUILDS.values() for file in build):
        if not (package / "dist" / file).is_file():
            raise UserError(f"--onnxruntime_web {package}: has no dist/{file}; the page is written for {_VERSION}")


def write_page(bundle: Path, package: Path | None) -> None:
    """Writes ``browser/`` into a bundle's folder.

    Args:
        bundle: the folder.
        package: npm's onnxruntime-web, whose files are copied; None: the page takes them from a CDN.
    """
    folder = bundle / "browser"
    shutil.copytree(_PAGE, folder)
    version, source, integrity = _VERSION, _CDN, _INTEGRITY
    if package is not None:
        version, source = read_json(package / "package.json", _NpmPackage).version, "onnxruntime-web/"
        (folder / source).mkdir()
        for file in _INTEGRITY:
            shutil.copyfile(package / "dist" / file, folder / source / file)
        integrity = {file: _integrity_of(folder / source / file) for file in _INTEGRITY}
    builds = {
        backend: {
            "module": {"file": module, "integrity": integrity[module]},
            "wasm": {"file": wasm, "integrity": integrity[wasm]},
        }
        for backend, (module, wasm) in _BUILDS.items()
    }
    write_json(folder / "runtime.json", {"version": version, "source": source, "builds": builds})


def _integrity_of(file: Path) -> str:
    return "sha384-" + base64.b64encode(hashlib.sha384(file.read_bytes()).digest()).decode()
