"""The tutorials do what they say: every block of a page is run as it stands, in order, at miniature size."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mnif.cli import main
from mnif.data import builtin

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for path in (ROOT / "docs/tutorials").glob("*.md") if path.name != "index.md")

MINIATURE = {
    "fit": "--max_train_steps 8 --resolution 16 --num_bases 4 --width 8 --depth 1 --cells 2 --latent_dim 12 "
    "--encoder_width 8 --train_batch_size 8 --refinement_steps 1 --held_out_fraction 0.2 --compile off",
    # Shapes must have a surface.
    "fit furniture": "--max_train_steps 150 --stride 2 --lr_warmup_steps 5 --latent_noise 0 --num_bases 16 --width 16 "
    "--depth 2 --latent_dim 24 --encoder_width 64 --train_batch_size 16",
    "fit furniture-views": "--rays_per_step 32 --samples_per_ray 8",
    "prior": "--max_train_steps 4 --width 8 --depth 1",
    "distill": "--max_train_steps 4 --matching_steps 4 --num_pairs 64 --width 8 --depth 1",
    "sample": "--num_samples 4",
    "eval": "--num_samples 8 --refinement_steps 1",
    "encode": "--refinement_steps 1",
    "export": "--num_baked 1 --compile_rtx off",
    "bench": "--rounds 2",
    "--turntable": "--frames 3",
}
"""Flags for commands with all words of a key: they take the place of a page's own and make its commands small."""


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """Language and text of every block that is to be run."""
    return re.findall(r"^```(sh|python)\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def in_miniature(command: list[str]) -> list[str]:
    """A command of mnif with the flags of its miniature in place of those given; a dry run stays as it is."""
    if "--dry_run" in command:
        return command
    for words, small in MINIATURE.items():
        if set(words.split()) <= set(command):
            command = with_flags(command, small.split())
    return command


def with_flags(command: list[str], flags: list[str]) -> list[str]:
    """A command with flags, without what it said of them before."""
    kept, dropping = [], False
    for word in command:
        dropping = word in flags if word.startswith("--") else dropping
        kept += [] if dropping else [word]
    return kept + flags


def run_shell(lines: list[str]) -> None:
    """Runs lines that are not mnif's in one shell whose python3 is this one."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["bash", "-euc", "\n".join(lines)], check=True, env=os.environ | {"PATH": path})


def run_commands(block: str) -> None:
    """Runs a block of shell: commands of mnif in this process, which knows torch already, all else in a shell."""
    others: list[str] = []
    for line in [*block.replace("\\\n", " ").splitlines(), "mnif"]:
        words = shlex.split(line, comments=True)
        launcher, _, command = line.partition(" mnif ")
        if words and words[0] != "mnif":
            rest = in_miniature(shlex.split(command, comments=True))
            others.append(f"{launcher} mnif {shlex.join(rest)}" if command else line)
            continue
        if others:
            run_shell(others)
            others.clear()
        if words[1:]:
            assert main(in_miniature(words[1:])) == 0, line


@pytest.fixture(scope="module")
def few_pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of built-in files, of which each holds a part of its objects only."""
    folder = tmp_path_factory.mktemp("files")
    for name, some in (("furniture.npz", slice(0, None, 8)), ("furniture_views.npz", slice(0, 30))):
        with np.load(builtin._FOLDER / name) as content:
            arrays = dict(content.items())
        count = len(arrays["ids"])
        arrays |= {key: values[some] for key, values in arrays.items() if values.shape[:1] == (count,)}
        if "image_offsets" in arrays:
            arrays["image_offsets"] = arrays["image_offsets"][: 30 * len(arrays["poses"]) + 1]
        np.savez(folder / name, **arrays)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_a_tutorial_runs_as_it_stands(
    page: Path, picture_folder: Path, few_pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pictures").symlink_to(picture_folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(builtin, "_FOLDER", few_pieces)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    blocks = blocks_of(page)
    assert blocks
    known: dict[str, object] = {}
    for language, block in blocks:
        if language == "sh":
            run_commands(block)
        else:
            exec(compile(block, page.name, "exec"), known)


def test_a_miniature_takes_the_place_of_the_flags_of_a_page() -> None:
    small = in_miniature(shlex.split("sample --model M --num_samples 64 --turntable gif --output_dir O"))
    assert small == shlex.split("sample --model M --turntable gif --output_dir O --num_samples 4 --frames 3")
    dry = shlex.split("fit --data D --output_dir O --dry_run")
    assert in_miniature(dry) == dry
