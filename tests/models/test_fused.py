"""The MLP in fewer passes: the numbers of the plain one, and out of the way of whatever stands in for its layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from opensora.models.embeddings import MLP
from opensora.models.fused import ROWS, FusedLinear
from opensora.models.mmdit import StreamMLP
from opensora.models.transformer import modulate


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every fused product that is asked for."""
    rows: list[int] = []
    fused = torch.ops.mkldnn._linear_pointwise

    def counted(x, *rest):
        rows.append(x.numel() // x.shape[-1])
        return fused(x, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    return rows


def plain(mlp: MLP, x: torch.Tensor) -> torch.Tensor:
    return F.linear(F.gelu(mlp.fc1(x), approximate=mlp.approximate), mlp.fc2.weight, mlp.fc2.bias)


def mlp_of(dtype: torch.dtype = torch.float32, exact: bool = False) -> MLP:
    torch.manual_seed(0)
    return MLP(48, 96, 32, exact=exact).to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 48), (2, ROWS, 48), (48,)])
def test_it_is_what_the_plain_one_is(exact: bool, shape: tuple[int, ...], products: list[int]) -> None:
    mlp, x = mlp_of(exact=exact), torch.randn(shape)
    torch.testing.assert_close(mlp(x), plain(mlp, x), rtol=1e-5, atol=1e-6)
    rows = x.numel() // 48
    assert sum(products) == rows and max(products) <= ROWS and mlp(x).shape == (*shape[:-1], 32)


@torch.no_grad()
def test_half_precision_is_no_further_from_full_than_the_plain_one() -> None:
    half, x = mlp_of(torch.bfloat16), torch.randn(512, 48).bfloat16()
    full = MLP(48, 96, 32)
    full.load_state_dict({name: weight.float() for name, weight in half.state_dict().items()})
    wanted = full(x.float())
    own, usual = ((made.float() - wanted).square().mean() for made in (half(x), plain(half, x)))
    assert own <= 1.02 * usual


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_a_bias_in_the_same_pass_changes_no_bit(bias: bool, products: list[int]) -> None:
    torch.manual_seed(0)
    layer, x = FusedLinear(48, 96, bias=bias).bfloat16(), torch.randn(3, 70, 48).bfloat16()
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    in_half = [210] if bias and torch.ops.mkldnn._is_mkldnn_bf16_supported() else []
    assert products == in_half
    FusedLinear(48, 96, bias=bias)(x.float())
    assert products == in_half


@torch.no_grad()
def test_the_mlp_of_a_stream_is_fused_too(products: list[int]) -> None:
    torch.manual_seed(0)
    mlp, x = StreamMLP(48, 96), torch.randn(2, 9, 48)
    weights = mlp.state_dict()
    inner = F.gelu(F.linear(x, weights["0.weight"], weights["0.bias"]), approximate="tanh")
    expected = F.linear(inner, weights["2.weight"], weights["2.bias"])
    torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-6)
    assert products == [18]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modulation_without_new_memory_changes_no_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, shift, scale = torch.randn(2, 3, 5, 48).to(dtype), *torch.randn(2, 2, 1, 1, 48).to(dtype)
    kept, with_gradients = x.clone(), modulate(x, shift, scale)
    with torch.no_grad():
        assert torch.equal(modulate(x, shift, scale), with_gradients)
        assert modulate(x, shift.float(), scale.float()).dtype == torch.float32
    assert torch.equal(x, kept)


def test_gradients_and_other_layers_are_computed_plainly(products: list[int]) -> None:
    x, mlp = torch.randn(4, 48), mlp_of()
    mlp(x).sum().backward()
    assert mlp.fc1.weight.grad is not None
    with torch.no_grad():
        replaced = mlp_of()
        replaced.fc1 = nn.Sequential(replaced.fc1)
        torch.testing.assert_close(replaced(x), plain(mlp_of(), x))
        mlp_of(torch.float64)(x.double())
        with torch.autocast("cpu"):
            assert mlp_of()(x).dtype == torch.bfloat16
    assert products == []


@torch.no_grad()
@pytest.mark.parametrize("layer", ["fc1", "fc2"])
def test_hooks_see_one_call_and_change_no_bit(layer: str, products: list[int]) -> None:
    """Whoever offloads weights does not move them for every piece, and gets the same numbers."""
    mlp, x, calls = mlp_of(), torch.randn(2, ROWS, 48), []
    expected = mlp(x)
    assert len(products) == 2
    getattr(mlp, layer).register_forward_pre_hook(lambda *_: calls.append(1))
    assert torch.equal(mlp(x), expected)
    assert len(calls) == 1 and len(products) == 3


@torch.no_grad()
def test_nothing_comes_of_nothing() -> None:
    assert mlp_of()(torch.randn(0, 5, 48)).shape == (0, 5, 32)
