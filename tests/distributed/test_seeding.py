"""Draws depend on their key alone, in every process and on every machine."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opensora.distributed.seeding import BatchKey, derive_seed, generator

KEYS = st.lists(st.integers(0, 2**40) | st.sampled_from(["", "0", "clips", "noise"]), max_size=5).map(tuple)


@given(KEYS)
def test_seeds_are_63_bits_and_a_function_of_the_key(key):
    assert 0 <= derive_seed(*key) < 2**63
    assert derive_seed(*key) == derive_seed(*key)


@given(KEYS, KEYS)
def test_other_keys_give_other_seeds(key, other):
    assert (derive_seed(*key) == derive_seed(*other)) == (key == other)


def test_neighbouring_keys_are_told_apart():
    """A number is not its digits, and parts of a key do not run together."""
    keys = [(1, 2), (12,), ("1", 2), ("12",), (2, 1), (1, 2, 0), ("a", "b"), ("ab",), ()]
    assert len({derive_seed(*key) for key in keys}) == len(keys)


def test_seeds_never_change():
    """Resumed runs rely on these very numbers, in every process."""
    assert derive_seed(0, "clips", 0, 0, 0) == 3696939982170861339


def test_generators_are_fresh_and_leave_the_global_state_alone():
    before = torch.get_rng_state()
    first, second = (torch.randn(4, generator=generator(3, "x")) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("change", [{"seed": 1}, {"position": 1}])
def test_a_draw_depends_on_the_seed_and_the_position(change):
    def drawn(**place: int) -> torch.Tensor:
        return torch.randn(8, generator=BatchKey(**({"seed": 0, "position": 0, "step": 7} | place)).generator("noise"))

    assert not torch.equal(drawn(), drawn(**change))
    assert torch.equal(drawn(), drawn(step=3))  # so that ranks and microbatches may be exchanged


def test_positions_and_purposes_never_draw_alike():
    places = itertools.product(range(24), ("clips", "noise", "t"))
    seeds = [BatchKey(0, position).generator(use).initial_seed() for position, use in places]
    assert len(set(seeds)) == len(seeds)
