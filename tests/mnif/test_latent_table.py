from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mnif.latents.embedding import LatentEmbedding
from mnif.latents.table import LatentTable
from mnif.utils.errors import UserError


@pytest.fixture
def table() -> LatentTable:
    latents = torch.randn(6, 4) * 3 + 1
    held_out = torch.tensor([False, False, True, False, False, True])
    return LatentTable(latents, ["a", "é/2.png", "", "d" * 300, "5", "六"], held_out, "f" * 64, "some data")


def test_table_comes_back_as_it_was(table: LatentTable, tmp_path: Path) -> None:
    table.save(tmp_path / "latents.safetensors")
    loaded = LatentTable.load(tmp_path / "latents.safetensors", "f" * 64)
    assert loaded.ids == table.ids
    assert torch.equal(loaded.latents, table.latents)
    assert torch.equal(loaded.held_out, table.held_out)
    assert (loaded.fingerprint, loaded.data) == (table.fingerprint, table.data)


def test_the_same_table_makes_the_same_bytes(table: LatentTable, tmp_path: Path) -> None:
    table.data = 'näme with "quotes"\n\t\x01\x7f'
    files = []
    for _ in range(20):
        table.save(tmp_path / "latents.safetensors")
        files.append((tmp_path / "latents.safetensors").read_bytes())
        assert LatentTable.load(tmp_path / "latents.safetensors").data == table.data
    assert len(set(files)) == 1


def test_the_same_learned_rows_make_the_same_bytes(tmp_path: Path) -> None:
    rows, files = LatentEmbedding(10, 5, lanes=4, learning_rate=0.1, seed=0), set()
    for _ in range(20):
        rows.save(tmp_path)
        (path,) = tmp_path.iterdir()
        files.add(path.read_bytes())
    assert len(files) == 1
    rows.load(tmp_path)


def test_statistics_are_those_of_the_training_rows(table: LatentTable) -> None:
    mean, std = table.mean_and_std()
    rows = table.latents[[0, 1, 3, 4]].numpy()
    torch.testing.assert_close(mean, torch.from_numpy(rows.mean(0)))
    torch.testing.assert_close(std, torch.from_numpy(rows.std(0)))


def test_statistics_of_more_rows_than_are_read_at_once() -> None:
    held_out = torch.arange(20_000) % 7 == 0
    table = LatentTable(torch.randn(20_000, 3) + 100, [""] * 20_000, held_out, "f" * 64, "some data")
    std, mean = torch.std_mean(table.latents[~held_out].double(), dim=0, correction=0)
    torch.testing.assert_close(table.mean_and_std(), (mean.float(), std.float()), rtol=1e-6, atol=0)


def test_table_of_another_decoder_is_refused(table: LatentTable, tmp_path: Path) -> None:
    table.save(tmp_path / "latents.safetensors")
    with pytest.raises(UserError, match="belong to decoder ffffffffffff, not to the one at hand"):
        LatentTable.load(tmp_path / "latents.safetensors", "0" * 64)


def test_damaged_missing_and_foreign_files_are_refused(table: LatentTable, tmp_path: Path) -> None:
    path = tmp_path / "latents.safetensors"
    with pytest.raises(UserError, match="no latent table"):
        LatentTable.load(path)
    table.save(path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match="damaged"):
        LatentTable.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not a latent table"):
        LatentTable.load(path)
