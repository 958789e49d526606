"""The tests' own way to run several ranks."""

import os
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

pytestmark = pytest.mark.multi


@dataclass(frozen=True)
class Offset:
    value: int


def sum_of_ranks(offset: Offset) -> tuple[int, torch.Tensor]:
    total = torch.tensor(float(dist.get_rank() + offset.value))
    dist.all_reduce(total)
    return dist.get_rank(), total


def raise_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("no such clip")
    dist.barrier()


def die_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_rank_answers_in_its_order(num_ranks: int) -> None:
    total = sum(range(num_ranks)) + 10 * num_ranks
    assert run_ranks(num_ranks, sum_of_ranks, Offset(10)) == [(rank, total) for rank in range(num_ranks)]


def test_a_rank_that_raises_fails_the_test_with_its_traceback() -> None:
    with pytest.raises(AssertionError, match=r"rank 1 raised\n(.|\n)*ValueError: no such clip"):
        run_ranks(2, raise_on_rank_1)


def test_a_rank_that_dies_fails_the_test() -> None:
    with pytest.raises(AssertionError, match="rank"):
        run_ranks(2, die_on_rank_1)
