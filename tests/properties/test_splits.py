"""The split of a data set: what an instance is used for depends on its group's name alone."""

from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mnif.data.dataset import Dataset, Split


@dataclass(frozen=True)
class Names(Dataset):
    """A data set without arrays."""

    name: str
    ids: list[str]
    groups: list[str]

    def arrays(self) -> dict[str, np.ndarray]:
        return {}


names = st.lists(st.text(max_size=8), unique=True, max_size=40)
fractions = st.floats(0, 0.5)


def by_group(ids: list[str], held_out: float, test: float) -> dict[str, int]:
    return dict(zip(ids, Names("set", ids, ids).split(held_out, test).tolist(), strict=True))


@given(names, names, fractions, fractions)
def test_an_instance_keeps_its_split_when_the_set_grows(
    ids: list[str], more: list[str], held_out: float, test: float
) -> None:
    before, after = by_group(ids, held_out, test), by_group(list(dict.fromkeys([*more, *ids])), held_out, test)
    assert before.items() <= after.items()


@given(st.lists(st.sampled_from("abcdefgh"), max_size=40), fractions, fractions)
def test_a_group_stays_together(groups: list[str], held_out: float, test: float) -> None:
    data = Names("set", [str(number) for number in range(len(groups))], groups)
    assert len(set(zip(groups, data.split(held_out, test).tolist(), strict=True))) == len(set(groups))


@given(names, fractions, fractions)
def test_a_test_part_moves_nothing_that_was_held_out(ids: list[str], held_out: float, test: float) -> None:
    data = Names("set", ids, ids)
    assert ((data.split(held_out, test) == Split.HELD_OUT) == data.held_out(held_out)).all()


@settings(max_examples=20)
@given(st.integers(0, 2**31), fractions, fractions)
def test_fractions_are_about_what_was_asked(seed: int, held_out: float, test: float) -> None:
    ids = [f"{seed} {number}" for number in range(2000)]
    shares = np.bincount(Names("set", ids, ids).split(held_out, test), minlength=3) / 2000
    np.testing.assert_allclose(shares, [1 - held_out - test, held_out, test], atol=0.06)
