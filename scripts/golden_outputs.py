"""Hashes of what small runs of the whole chain write, to compare two versions of the code on one machine.

python scripts/golden_outputs.py --output_dir runs/before
python scripts/golden_outputs.py --output_dir runs/after --compare runs/before/hashes.json

Fits, samples, exports and measures the built-in sets at miniature size, and writes OUTPUT_DIR/hashes.json: of tensors
(whatever their order in a file), pictures, graphs, and metrics without times, paths and commands.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors import safe_open

COMMANDS = """
fit --data twemoji --output_dir OUT/emoji --random_flip --random_colours --max_train_steps 60
prior --run OUT/emoji --max_train_steps 60
distill --run OUT/emoji --num_pairs 1024 --max_train_steps 60 --matching_steps 20
sample --model OUT/emoji/model --num_samples 96 --output_dir OUT/emoji/pictures
export --model OUT/emoji/model --output_dir OUT/emoji/bundle
eval --model OUT/emoji/model --reference twemoji --num_samples 40 --output_dir OUT/emoji/eval
encode --model OUT/emoji/model --data twemoji --split held_out --refinement_steps 3 --output_dir OUT/emoji/encoded
fit --data furniture --output_dir OUT/shapes --max_train_steps 40 --refinement_steps 5
prior --run OUT/shapes --max_train_steps 60
sample --model OUT/shapes/model --num_samples 4 --output_dir OUT/shapes/drawn
export --model OUT/shapes/model --output_dir OUT/shapes/bundle --num_baked 1
fit --data furniture-views --output_dir OUT/views --max_train_steps 30 --refinement_steps 2 --max_views 6
prior --run OUT/views --max_train_steps 60
sample --model OUT/views/model --num_samples 2 --output_dir OUT/views/drawn
export --model OUT/views/model --output_dir OUT/views/bundle --num_baked 1
fit --data twemoji --output_dir OUT/auto --method auto-decoding --max_train_steps 30 --refinement_steps 2
fit --data twemoji --output_dir OUT/auto-meta --method meta --max_train_steps 10 --refinement_steps 2
"""

HASHED = {".safetensors", ".png", ".onnx", ".npz", ".npy", ".glb", ".bin", ".jsonl"}

# What differs from run to run: the entries of metrics whose names hold one of these.
UNSTABLE = ["command", "measured", "seconds", "peak_rss", "per_second", "milliseconds", "latency", "_ms"]
UNSTABLE += ["throughput", "speed"]


def main(arguments: list[str] | None = None) -> int:
    """Runs the chain and writes the hashes; returns 1 if they differ from those compared with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="gets the runs and hashes.json")
    parser.add_argument("--compare", type=Path, help="a hashes.json of another version")
    parser.add_argument("--hash_only", action="store_true", help="hash what is there, run nothing")
    flags = parser.parse_args(arguments)
    output = flags.output_dir.resolve()
    for command in [] if flags.hash_only else COMMANDS.strip().splitlines():
        words = [word.replace("OUT", str(output)) for word in command.split()]
        print("mnif", *words, flush=True)
        subprocess.run([sys.executable, "-m", "mnif", *words], check=True)
    hashes = hashes_of_folder(output)
    (output / "hashes.json").write_text(json.dumps(hashes, indent=1) + "\n")
    print(f"{output / 'hashes.json'}: {len(hashes)} files")
    if flags.compare is None:
        return 0
    others = json.loads(flags.compare.read_text())
    differing = [name for name in sorted(hashes.keys() | others.keys()) if hashes.get(name) != others.get(name)]
    print("\n".join(f"differs: {name}" for name in differing) or "nothing differs")
    return int(bool(differing))


def hashes_of_folder(folder: Path) -> dict[str, str]:
    """Hashes every result below a folder, by path; checkpoints and the copies of the device's code are left out."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {
        name: hash_of_file(folder / name, folder)
        for name in names
        if (Path(name).suffix in HASHED or Path(name).name == "metrics.json")
        and "checkpoints" not in name
        and "/device/" not in name
    }


def hash_of_file(path: Path, folder: Path) -> str:
    """Hashes what a file says, not how: tensors by name, metrics without times and without the folder's path."""
    if path.suffix == ".safetensors":
        digest = hashlib.sha256()
        with safe_open(path, "np") as file:
            for name in sorted(file.keys()):
                value = file.get_tensor(name)
                digest.update(f"{name} {value.dtype} {value.shape}".encode() + value.tobytes())
        return digest.hexdigest()
    content = path.read_bytes()
    if path.suffix == ".json":
        content = _stable_json(content, folder).encode()
    elif path.suffix == ".jsonl":
        content = json.dumps(sorted(_stable_json(line, folder) for line in content.splitlines())).encode()
    return hashlib.sha256(content).hexdigest()


def _stable_json(content: bytes, folder: Path) -> str:
    return json.dumps(_without_unstable(json.loads(content), str(folder)), sort_keys=True)


def _without_unstable(value: Any, folder: str) -> Any:
    if isinstance(value, str):
        return value.replace(folder, "OUT")
    if isinstance(value, list):
        return [_without_unstable(each, folder) for each in value]
    if isinstance(value, dict):
        kept = {name: each for name, each in value.items() if not any(word in name for word in UNSTABLE)}
        return {name: _without_unstable(each, folder) for name, each in kept.items()}
    return value


if __name__ == "__main__":
    sys.exit(main())
