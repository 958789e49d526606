"""Counting memory on tensors without data."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from opensora.planning.tracing import Tracer, weight_bytes

KB = 1024


def kilobytes(count: int) -> torch.Tensor:
    return torch.empty(count * KB // 4)


def test_what_lives_at_the_worst_moment_counts():
    def compute():
        first = kilobytes(4)
        second = torch.cat([first, first])  # 4 + 8
        del first
        third = torch.cat([second, second])  # 8 + 16
        del second, third
        kilobytes(20)

    assert Tracer().peak_bytes(compute) == 24 * KB


def test_views_take_nothing_and_neither_does_what_was_there_before():
    tracer = Tracer()
    with tracer.without_data():
        weight, network = kilobytes(64).view(128, 128), nn.Linear(128, 128)

    def compute():
        rows = weight.t()[:4]
        (network(rows) + 1).view(-1)  # two results of 4 x 128 at once

    assert tracer.peak_bytes(compute) == 2 * 4 * 128 * 4
    assert tracer.peak_bytes(compute) == 2 * 4 * 128 * 4


def test_in_place_operations_take_nothing():
    assert Tracer().peak_bytes(lambda: kilobytes(8).div_(2).add_(1).clamp_(0, 1)) == 8 * KB


def test_no_memory_is_needed_to_trace():
    def compute():
        torch.empty(2**40) @ torch.empty(2**40, 2)

    assert Tracer().peak_bytes(compute) == 3 * 2**42 + 8


def test_fused_attention_keeps_no_scores():
    def compute():
        query = torch.empty(1, 2, 4096, 8)
        F.scaled_dot_product_attention(query, query, query)

    assert Tracer().peak_bytes(compute) < 3 * 2 * 4096 * 8 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_convolution_copies_images_in_channels_first(dtype):
    """Input and result in the library's own layout while it computes: twice what is seen from outside."""
    shape, kernel = (2, 32, 64, 64), (32, 32, 3, 3)

    def compute(layout: torch.memory_format):
        image = torch.empty(shape, dtype=dtype).contiguous(memory_format=layout)
        F.conv2d(image, torch.empty(kernel, dtype=dtype), padding=1)

    size = 2 * 32 * 64 * 64 * dtype.itemsize
    weight = 32 * 32 * 9 * dtype.itemsize
    tracer = Tracer()
    assert tracer.peak_bytes(lambda: compute(torch.contiguous_format)) == 3 * size + 2 * weight
    assert tracer.peak_bytes(lambda: compute(torch.channels_last)) == 2 * size + weight


def test_a_convolution_to_few_channels_fills_a_block_of_them():
    def compute():
        F.conv2d(torch.empty(2, 32, 64, 64), torch.empty(3, 32, 3, 3), padding=1)

    pixels, weight = 2 * 64 * 64 * 4, 3 * 32 * 9 * 4
    # the image, its copy and 16 channels of result; the 3 that are kept come when the copy is gone
    assert Tracer().peak_bytes(compute) == (32 + 32 + 16) * pixels + 2 * weight


class Doubling(nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values, values])[: len(values)].clone()


def test_what_is_alike_is_traced_once_and_counts_the_same():
    tracer = Tracer()
    blocks = [Doubling() for _ in range(3)]
    runs: list[int] = []

    def compute():
        kept = [kilobytes(5)]
        for block in blocks:
            kept.append(block(kept[-1]))
        runs.append(len(kept))

    plain = tracer.peak_bytes(compute)
    assert tracer.peak_bytes(compute, [[(block, "forward") for block in blocks]]) == plain
    assert plain == (3 + 2 + 1) * 5 * KB
    assert runs == [4, 4] and all("forward" not in vars(block) for block in blocks)


def test_what_is_alike_is_not_run_again():
    tracer, blocks = Tracer(), [Doubling(), Doubling()]
    called = []
    for block in blocks:
        block.register_forward_hook(lambda *_: called.append(1))

    class Counted(Doubling):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            called.append(2)
            return super().forward(values)

    counted = [Counted(), Counted()]
    tracer.peak_bytes(lambda: [block(kilobytes(1)) for block in counted], [[(block, "forward") for block in counted]])
    assert called == [2]
    tracer.peak_bytes(lambda: [block(kilobytes(size)) for size, block in enumerate(counted, 1)],
                      [[(block, "forward") for block in counted]])  # fmt: skip
    assert called == [2, 2, 2]  # other shapes are another matter


def test_tied_weights_count_once():
    network = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    network[1].weight = network[0].weight
    network.register_buffer("table", torch.zeros(4, dtype=torch.bfloat16))
    assert weight_bytes(network) == 8 * 8 * 4 + 4 * 2
