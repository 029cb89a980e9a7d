"""Random numbers of instances: SplitMix64's, spread as they should be, and the same in every batch."""

import numpy as np
import pytest
import torch
from scipy import stats

from mnif.data.batches import InstanceGenerator, instance_keys

WRAP = 2**64


def split_mix(key: int, number: int) -> int:
    """The number-th output of SplitMix64 from ``key`` on, in Python's own integers (Steele, Lea and Flood, 2014)."""
    z = (key + number * 0x9E3779B97F4A7C15) % WRAP
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % WRAP
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % WRAP
    return z ^ (z >> 31)


def test_bits_are_those_of_splitmix64() -> None:
    assert split_mix(0, 1) == 0xE220A8397B1DCDAF  # the first number published for it, from state 0
    keys = [0, 1, -5, 2**62 + 7]
    generator = InstanceGenerator(torch.tensor(keys))
    halves = []
    for key in keys:
        numbers = [split_mix(key % WRAP, number) for number in (1, 2)]
        signed = [(half ^ 2**31) for number in numbers for half in (number % 2**32, number >> 32)]
        halves.append([(half >> 8) / 2**24 for half in signed][:3])
    np.testing.assert_array_equal(generator.uniform(3).numpy(), np.float32(halves))
    third = [split_mix(key % WRAP, 3) % 2**32 for key in keys]  # drawn later: what comes next
    normal = stats.norm.ppf([((half ^ 2**31) // 2**8 + 0.5) / 2**24 for half in third])
    np.testing.assert_allclose(generator.normal().numpy(), normal, atol=1e-5, rtol=1e-5)


def test_numbers_are_spread_as_they_should_be() -> None:
    generator = InstanceGenerator(instance_keys(0, 3, torch.arange(2000)))
    uniform, normal = generator.uniform(31), generator.normal(5, 6)
    assert (uniform.min() >= 0, uniform.max() < 1, normal.isfinite().all()) == (True, True, True)
    for numbers, expected in ((uniform, "uniform"), (normal, "norm")):
        assert stats.kstest(numbers.flatten().numpy(), expected).pvalue > 1e-3
        table = numbers.flatten(1).numpy()
        between = np.corrcoef(table.T)[np.triu_indices(table.shape[1], 1)]  # of the numbers of one instance
        along = np.corrcoef(table[:300])[np.triu_indices(300, 1)]  # of one instance and another
        assert stats.kstest(between * np.sqrt(len(table)), "norm").pvalue > 1e-3
        assert abs(along.mean()) < 3 / np.sqrt(table.shape[1] * len(along))


def test_an_instance_gets_the_same_in_every_batch_and_another_in_every_step() -> None:
    rows = torch.tensor([7, 3, 10**12, 0])
    values = torch.ones(4, 11)

    def drawn(rows: torch.Tensor, seed: int = 0, batch: int = 5) -> torch.Tensor:
        generator = InstanceGenerator(instance_keys(seed, batch, rows))
        parts = [generator.normal(3), generator.uniform()[:, None], generator.dropout(values[: len(rows)], 0.5)]
        return torch.cat(parts, dim=1)

    together = drawn(rows)
    for place, row in enumerate(rows):
        assert torch.equal(drawn(row[None])[0], together[place])
    assert torch.equal(drawn(rows.flip(0)), together.flip(0))
    for other in (drawn(rows, seed=1), drawn(rows, batch=6), drawn(rows + 1)):
        assert not (other[:, :4] == together[:, :4]).any()


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_compiled_code_draws_the_same() -> None:
    """Compilers fold whole numbers without wrapping them at 64 bits; here that is not left to them."""
    keys = instance_keys(0, 0, torch.arange(5))

    def drawn(keys: torch.Tensor) -> torch.Tensor:
        generator = InstanceGenerator(keys)
        return torch.cat([generator.uniform(3), generator.normal(4), generator.dropout(torch.ones(5, 6), 0.5)], dim=1)

    compiled = torch.compile(drawn, fullgraph=True)(keys)
    torch.testing.assert_close(compiled, drawn(keys), atol=1e-6, rtol=0)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_dropout_leaves_out_its_share_and_keeps_the_mean(share: float) -> None:
    generator = InstanceGenerator(instance_keys(1, 0, torch.arange(500)))
    values = torch.full((500, 3, 37), 2.0, requires_grad=True)
    dropped = generator.dropout(values, share)
    assert set(dropped.unique().tolist()) == {0, torch.tensor(2 / (1 - share)).item()}
    assert (dropped == 0).float().mean().item() == pytest.approx(share, abs=4 * (share * (1 - share) / 55500) ** 0.5)
    dropped.sum().backward()
    torch.testing.assert_close(values.grad, dropped.detach() / 2)
    assert torch.equal(generator.dropout(values, 0.0), values)
