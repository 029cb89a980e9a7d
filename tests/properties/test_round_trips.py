"""What is written comes back."""

import tempfile
from pathlib import Path
from random import Random

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mnif.data.voxel_formats import read_binvox, write_binvox
from mnif.latents.table import LatentTable


@settings(max_examples=40)
@given(st.integers(1, 12).flatmap(lambda size: arrays.arrays(bool, (size, size, size))))
def test_binvox(occupancy: np.ndarray) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_binvox(Path(folder) / "shape.binvox", occupancy)
        np.testing.assert_array_equal(read_binvox(Path(folder) / "shape.binvox"), occupancy)


@settings(max_examples=40)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), unique=True, min_size=1, max_size=9),
    st.integers(1, 5),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.randoms(use_true_random=False),
)
def test_latent_tables(ids: list[str], dimension: int, data: str, random: Random) -> None:
    latents = torch.tensor([[random.random() for _ in range(dimension)] for _ in ids])
    held_out = torch.tensor([random.random() < 0.5 for _ in ids[1:]] + [False])
    table = LatentTable(latents, ids, held_out, "fingerprint", data)
    with tempfile.TemporaryDirectory() as folder:
        table.save(Path(folder) / "latents.safetensors")
        loaded = LatentTable.load(Path(folder) / "latents.safetensors", "fingerprint")
    torch.testing.assert_close(loaded.latents, latents, rtol=0, atol=0)
    assert (loaded.ids, loaded.fingerprint, loaded.data) == (ids, "fingerprint", data)
    assert loaded.held_out.tolist() == held_out.tolist()
