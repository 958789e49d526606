"""The layouts in which weights of an MMDiT are published, and the exact way from each to the others.

FLUX stores queries, keys and values of a layer in one matrix (fused) and turns neighbouring features of a head together
(interleaved rotary positions); Open-Sora 2.0 has three matrices and turns feature j together with feature j + d / 2.
Both compute the same where rows are put in the other order: of every head, new[j] = old[2 j] and new[d / 2 + j] =
old[2 j + 1], for queries and keys, weights, biases and the scales of their norms alike. Values stay as they are.

Letters: D hidden size, d features of a head.
"""

import re
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

_FUSED = re.compile(r"^(double_blocks\.\d+\.(?:img|txt)_attn)\.qkv\.(weight|bias)$")
_FUSED_SINGLE = re.compile(r"^(single_blocks\.\d+)\.linear1\.(weight|bias)$")
_QUERY = re.compile(r"^((?:double|single)_blocks\.\d+(?:\.(?:img|txt)_attn)?)\.q_proj\.(weight|bias)$")
_TURNED = re.compile(r"\.(q_proj|k_proj)\.(weight|bias)$")
_SCALE = re.compile(r"\.norm\.(query|key)_norm\.scale$")


class DerivedWeights(Mapping[str, Tensor]):
    """Tensors that are made when they are asked for, so that a large network is never in memory twice.

    Args:
        makers: name -> what makes it.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> Tensor:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def is_fused(names: Mapping[str, object]) -> bool:
    """Whether queries, keys and values are stored in one matrix."""
    return any(_FUSED.match(name) or _FUSED_SINGLE.match(name) for name in names)


def convert_layout(
    weights: Mapping[str, Tensor], *, interleaved: bool, to_fused: bool, to_interleaved: bool
) -> Mapping[str, Tensor]:
    """Weights that compute the same in another layout; lossless both ways.

    Args:
        weights: by published names.
        interleaved: their rotary positions, which names and shapes do not tell.
        to_fused: the layout wanted.
        to_interleaved: the rotary positions wanted.
    """
    if interleaved != to_interleaved:
        weights = _reorder(split_qkv(weights), _neighbours if to_interleaved else _halves)
    return fuse_qkv(weights) if to_fused else split_qkv(weights)


def split_qkv(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """One layer for each of queries, keys and values (in single-stream layers: values and MLP)."""
    makers: dict[str, Callable[[], Tensor]] = {}
    for name in weights:
        if match := _FUSED.match(name):
            for place, part in enumerate(("q_proj", "k_proj", "v_proj")):
                makers[f"{match[1]}.{part}.{match[2]}"] = lambda n=name, i=place: weights[n].chunk(3)[i]
        elif match := _FUSED_SINGLE.match(name):
            size = len(weights[f"{match[1]}.linear2.weight"])  # D
            for place, part in enumerate(("q_proj", "k_proj", "v_mlp")):
                end = None if part == "v_mlp" else (place + 1) * size
                makers[f"{match[1]}.{part}.{match[2]}"] = lambda n=name, a=place * size, b=end: weights[n][a:b]
        else:
            makers[name] = lambda n=name: weights[n]
    return DerivedWeights(makers)


def fuse_qkv(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """One layer for queries, keys and values (in single-stream layers: and the MLP)."""
    makers: dict[str, Callable[[], Tensor]] = {}
    joined: set[str] = set()
    for name in weights:
        if match := _QUERY.match(name):
            single = match[1].startswith("single_blocks")
            parts = [f"{match[1]}.{part}.{match[2]}" for part in ("q_proj", "k_proj", "v_mlp" if single else "v_proj")]
            joined.update(parts)
            fused = f"{match[1]}.{'linear1' if single else 'qkv'}.{match[2]}"
            makers[fused] = lambda parts=parts: torch.cat([weights[part] for part in parts])
    makers |= {name: lambda n=name: weights[n] for name in weights if name not in joined}
    return DerivedWeights(makers)


def _reorder(weights: Mapping[str, Tensor], order: Callable[[Tensor], Tensor]) -> Mapping[str, Tensor]:
    """The rows of queries and keys of every head, and the scales of their norms, in another order."""
    head_dim = next(len(weights[name]) for name in weights if _SCALE.search(name))
    makers: dict[str, Callable[[], Tensor]] = {name: lambda n=name: weights[n] for name in weights}
    for name in weights:
        if _TURNED.search(name) or _SCALE.search(name):
            makers[name] = lambda n=name: order(weights[n].unflatten(0, (-1, head_dim))).flatten(0, 1)
    return DerivedWeights(makers)


def _halves(heads: Tensor) -> Tensor:
    """(heads, d, ...): even features first, then odd ones."""
    return torch.cat([heads[:, 0::2], heads[:, 1::2]], dim=1)


def _neighbours(heads: Tensor) -> Tensor:
    """The inverse."""
    first, second = heads.chunk(2, dim=1)
    return torch.stack([first, second], dim=2).flatten(1, 2)
