"""Adapters and the network that they change: whether they fit, and the network's weights with them merged in.

Merging happens while weights are read, W + scale * alpha / r * B A, in float32 and before they are cast, so that the
network runs as fast as without it and nothing has to know of it. At scale 0 an adapter is left out: the base is what it
was, to the bit.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from opensora.adapters.adapter import Adapter
from opensora.adapters.names import LayerNames
from opensora.errors import OpenSoraError
from opensora.weights import fingerprint


class AdaptedWeights(Mapping[str, Tensor]):
    """The weights of a transformer with adapters merged into them, each tensor when it is asked for.

    Args:
        model: the transformer that they are for; its names and shapes are all that is looked at.
        stored: its weights, under its names.
        adapters: adapters and their scales; those of scale 0 are left out.
        source: what to call the weights in an error.

    Raises:
        OpenSoraError: an adapter of another network.
    """

    def __init__(
        self,
        model: nn.Module,
        stored: Mapping[str, Tensor],
        adapters: Sequence[tuple[Adapter, float]],
        source: str,
    ) -> None:
        self._stored = stored
        fitting = [(fit_to_weights(adapter, model, stored, source), scale) for adapter, scale in adapters]
        self._adapters = [(adapter, scale) for adapter, scale in fitting if scale]

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._stored[name]
        layer = name.removesuffix(".weight")
        for adapter, scale in self._adapters:
            if name.endswith(".weight") and layer in adapter.layers:
                tensor = tensor.float() + scale * adapter.delta(layer)
            if name in adapter.differences:
                tensor = tensor.float() + scale * adapter.differences[name].float()
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def fit(adapter: Adapter, model: nn.Module, source: str) -> Adapter:
    """An adapter under the names of the network that it changes.

    Args:
        adapter: as it was read.
        model: the network; its names and shapes are all that is looked at.
        source: what to call it in an error.

    Raises:
        OpenSoraError: an adapter of another network: of another class, with layers that this one does not have, or of
            other sizes.
    """
    origin, name = adapter.origin, type(model).__name__
    belongs = "" if origin is None else f"; it was trained on {origin.base}"
    if origin is not None and origin.class_name != name:
        raise OpenSoraError(f"{adapter.path} is an adapter of a {origin.class_name}, {source} is a {name}{belongs}")
    modules = dict(model.named_modules())
    names = LayerNames(modules)
    changed = [*adapter.layers, *(parameter.rpartition(".")[0] for parameter in adapter.differences)]
    try:
        found = names.find(changed)
    except OpenSoraError as error:
        raise OpenSoraError(f"{adapter.path}: {error}") from None
    if unknown := [layer for layer, own in found.items() if own is None]:
        share = "" if len(found) == 1 else f", one of {len(unknown)} of its {len(found)} layers"
        raise OpenSoraError(f"{adapter.path} changes {unknown[0]}{share}, which {source} does not have{belongs}")
    own_name = {layer: own for layer, own in found.items() if own is not None}
    if twice := [own for own, count in Counter(own_name.values()).items() if count > 1]:
        raise OpenSoraError(f"{adapter.path} changes {twice[0]} twice, under different names; expected it once")
    fitted = replace(
        adapter,
        layers={own_name[layer]: pair for layer, pair in adapter.layers.items()},
        alphas={own_name[layer]: alpha for layer, alpha in adapter.alphas.items()},
        differences={_renamed(parameter, own_name): tensor for parameter, tensor in adapter.differences.items()},
    )
    _check_shapes(fitted, modules, source, belongs)
    return fitted


def fit_to_weights(adapter: Adapter, model: nn.Module, weights: Mapping[str, Tensor], source: str) -> Adapter:
    """As `fit`; an adapter that says which weights it was trained on fits those alone.

    Args:
        adapter: as it was read.
        model: the network; its names and shapes are all that is looked at.
        weights: of the network, under its names.
        source: what to call them in an error.
    """
    fitted, origin = fit(adapter, model, source), adapter.origin
    if origin is not None and origin.fingerprint != fingerprint_of_layers(weights, fitted.layers):
        raise OpenSoraError(
            f"{adapter.path} was trained on other weights of {origin.base} than those of {source}; "
            "give the model that it was trained on"
        )
    return fitted


def fingerprint_of_layers(weights: Mapping[str, Tensor], layers: Mapping[str, object]) -> str:
    """What tells the base of an adapter from another: a hash of the weights that it changes."""
    return fingerprint({f"{layer}.weight": weights[f"{layer}.weight"] for layer in layers})


def _renamed(parameter: str, own_name: Mapping[str, str]) -> str:
    layer, _, kind = parameter.rpartition(".")
    return f"{own_name[layer]}.{kind}"


def _check_shapes(adapter: Adapter, modules: Mapping[str, nn.Module], source: str, belongs: str) -> None:
    for layer, (a, b) in adapter.layers.items():
        weight = _parameter(modules[layer], "weight")
        if not isinstance(weight, Tensor) or not isinstance(_base(modules[layer]), nn.Linear | nn.modules.conv._ConvNd):
            raise OpenSoraError(f"{adapter.path} changes {layer}, which in {source} is no layer with a matrix{belongs}")
        size = (len(b), *a.shape[1:])
        if tuple(weight.shape) != size:
            raise OpenSoraError(
                f"{adapter.path} changes {layer} of size {size}, in {source} it has {tuple(weight.shape)}{belongs}"
            )
    for name, difference in adapter.differences.items():
        layer, _, kind = name.rpartition(".")
        parameter = _parameter(modules[layer], kind)
        if parameter is None:
            raise OpenSoraError(f"{adapter.path} changes {name}, which {source} does not have{belongs}")
        if parameter.shape != difference.shape:
            raise OpenSoraError(
                f"{adapter.path} changes {name} of size {tuple(difference.shape)}, in {source} it has "
                f"{tuple(parameter.shape)}{belongs}"
            )


def _base(module: nn.Module) -> nn.Module:
    """The layer itself, where PEFT has put adapters beside it."""
    base = getattr(module, "base_layer", module)
    return base if isinstance(base, nn.Module) else module


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    found = getattr(_base(module), name, None)
    return found if isinstance(found, Tensor) else None
