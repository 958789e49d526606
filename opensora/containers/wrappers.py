"""The networks in a file of weights, found among the names that training frameworks put around those of a network.

DDP, FSDP, `torch.compile`, DeepSpeed, Lightning, ComfyUI, averages of weights and training scripts each add segments to
names: `module.`, `_orig_mod.`, `state_dict.model.`, `model.diffusion_model.`, `ema_model.`. They are not listed here by
their combinations: whatever stands before names that belong to a known network is what was put around them. Only what
stands within names is known by its name, and what tells averaged weights from the others.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from opensora.containers.tensors import is_of_optimizer
from opensora.errors import OpenSoraError
from opensora.models.format import Identity, Kind, Shaped
from opensora.models.identify import identify

_WITHIN = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_fpw_module"}
)
_AVERAGES = frozenset({"ema", "swa", "avg", "average", "averaged", "averaging", "shadow"})
_NO_AVERAGES = frozenset({"online_model", "online"})  # beside the average, inside of the same wrapper
_AROUND_UNKNOWN = ("state_dict", "model", "module", "network", "net", "params", "weights")
_FEWEST = 2  # tensors of a network


@dataclass(frozen=True)
class FoundNetwork:
    """Tensors of one network in a file.

    Attributes:
        label: what stands before their names, without its last dot; "" for nothing.
        names: name in the network -> name in the file.
        identity: which network; None if it is unknown.
        averaged: whether they are an average over the training.
    """

    label: str
    names: Mapping[str, str]
    identity: Identity | None
    averaged: bool

    @property
    def summary(self) -> str:
        """Kind and label, as in "a transformer (model.diffusion_model)"."""
        kind = "unknown network" if self.identity is None else self.identity.kind.replace("_", " ")
        kind = f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
        return f"{kind} ({self.label or 'at the top'})"


def choose_network(
    tensors: Mapping[str, Shaped], path: str, kind: Kind | None = None, which: str | None = None
) -> tuple[FoundNetwork, list[str]]:
    """The network in a file that is meant.

    Args:
        tensors: name in the file -> anything with a shape.
        path: what to call the file.
        kind: of the network wanted; None for the only one there is.
        which: of several: its label or a part of that, "ema" or "raw", or a kind. Without it averaged weights are
            preferred to those that they are an average of.

    Returns:
        The network, and what to say about the choice.

    Raises:
        OpenSoraError: there are several that could be meant, or none that is; names them.
    """
    found = find_networks(tensors)
    if all(network.identity is None for network in found) and (nameless := _nameless_averages(tensors)):
        raise OpenSoraError(
            f"{path} holds averaged weights without their names ({nameless[0]}); save the state_dict of the network "
            "that they were copied into"
        )
    wanted = [network for network in found if which is None or _is_called(network, which)]
    if not wanted:
        raise OpenSoraError(f"{path} holds nothing called {which!r}; it holds {_listed(found)}")
    of_kind = [n for n in wanted if kind is None or n.identity is None or n.identity.kind == kind]
    if not of_kind:
        of_kind = wanted  # whoever asked says what is there instead
    kinds = {n.identity.kind for n in of_kind if n.identity is not None}
    averaged = [network for network in of_kind if network.averaged]
    chosen = averaged if averaged and len(kinds) == 1 else of_kind
    if len(chosen) > 1:
        raise OpenSoraError(f"{path} holds {_listed(chosen)}; say which one is meant, such as {path}@{chosen[0].label}")
    return chosen[0], _notes(chosen[0], found, tensors) if which is None else []


def find_networks(tensors: Mapping[str, Shaped]) -> list[FoundNetwork]:
    """Every network whose tensors lie among these, at least one, be it unknown."""
    stored: dict[str, str] = {}
    for name in tensors:
        stored.setdefault(_without_wrappers(name), name)
    shapes = {name: tensors[there] for name, there in stored.items()}
    found = list(_search(shapes, ""))
    found += _averages_without_dots(shapes, found)
    if not found:
        found = [_unknown(shapes, "")]
    return [
        FoundNetwork(n.label, {name: stored[there] for name, there in n.names.items()}, n.identity, n.averaged)
        for n in found
    ]


def _search(tensors: Mapping[str, Shaped], prefix: str) -> Iterator[FoundNetwork]:
    """Networks among tensors, all of which are called `prefix` and more."""
    below = {name.removeprefix(prefix): name for name in tensors}
    identity = identify({name: tensors[there] for name, there in below.items()})
    parts: dict[str, dict[str, Shaped]] = {}
    for name, there in below.items():
        first, dot, _ = name.partition(".")
        if dot and not is_of_optimizer(first):
            parts.setdefault(first, {})[there] = tensors[there]
    within = [
        network
        for first, part in parts.items()
        if len(part) >= _FEWEST and (identity is None or not first.isdigit())
        for network in _search(part, f"{prefix}{first}.")
    ]
    if identity is None:
        yield from within
        return
    # Parts of a network may look like one themselves: a 2D autoencoder in a video autoencoder. Others only lie beside.
    beside = [n for n in within if n.identity is not None and (n.averaged or n.identity.kind != identity.kind)]
    apart = {there for network in beside for there in network.names.values()}
    names = {name: there for name, there in below.items() if there not in apart}
    if "n_averaged" in {name.rpartition(".")[2] for name in names}:  # torch's AveragedModel
        names = {name: there for name, there in names.items() if name != "n_averaged"}
    yield FoundNetwork(prefix.rstrip("."), names, identity, _is_averaged(prefix))
    yield from beside


def _averages_without_dots(tensors: Mapping[str, Shaped], found: list[FoundNetwork]) -> list[FoundNetwork]:
    """Averages as latent diffusion's scripts save them: `model_ema.` and the names of the network without any dot."""
    flat: dict[str, dict[str, str]] = {}
    for name in tensors:
        group, dot, rest = name.rpartition(".")
        if dot and _is_averaged(group):
            flat.setdefault(group, {})[rest] = name
    made: list[FoundNetwork] = []
    for group, names in flat.items():
        for network in found:
            begins = network.label.split(".") if network.label else []
            for skipped in range(len(begins) + 1):
                within = "".join(begins[skipped:])
                own = {name: names.get(within + name.replace(".", "")) for name in network.names}
                if all(own.values()):
                    made.append(
                        FoundNetwork(group, {n: there for n, there in own.items() if there}, network.identity, True)
                    )
                    break
    return made


def _unknown(tensors: Mapping[str, Shaped], prefix: str) -> FoundNetwork:
    """Tensors of no known network, without what is known to be around networks: of everything, or of the average."""
    below = {name.removeprefix(prefix): name for name in tensors}
    parts: dict[str, dict[str, Shaped]] = {}
    for name, there in below.items():
        first, dot, _ = name.partition(".")
        parts.setdefault(first if dot else "", {})[there] = tensors[there]
    inside = [first for first in parts if _is_averaged(first)]
    inside += [first for first in _AROUND_UNKNOWN if set(parts) == {first}]
    if inside and len(parts[inside[0]]) >= min(_FEWEST, len(tensors)):
        return _unknown(parts[inside[0]], f"{prefix}{inside[0]}.")
    return FoundNetwork(prefix.rstrip("."), below, None, _is_averaged(prefix))


def _without_wrappers(name: str) -> str:
    """A name without what FSDP, compilation, recomputation and DDP put inside of names."""
    kept: list[str] = []
    for segment in name.split("."):
        if segment in _WITHIN or (segment == "module" and kept and kept[-1].isdigit()):
            continue
        kept.append(segment)
    return ".".join(kept)


def _is_averaged(label: str) -> bool:
    for segment in reversed(label.lower().split(".")):
        if segment in _NO_AVERAGES:
            return False
        if not _AVERAGES.isdisjoint(segment.split("_")):
            return True
    return False


def _is_called(network: FoundNetwork, which: str) -> bool:
    if which in ("raw", "ema", "averaged"):
        return network.averaged == (which != "raw")
    kind = "" if network.identity is None else network.identity.kind
    return which in (network.label, kind, *network.label.split("."))


def _notes(chosen: FoundNetwork, found: list[FoundNetwork], tensors: Mapping[str, Shaped]) -> list[str]:
    """What whoever gave the file should know of what was taken from it."""
    of_kind = [n for n in found if n is not chosen and n.identity and chosen.identity]
    others = [n for n in of_kind if n.identity and chosen.identity and n.identity.kind == chosen.identity.kind]
    if others:
        what = "averaged weights" if chosen.averaged else "weights"
        instead = ", ".join(f"@{network.label or 'raw'}" for network in others)
        return [
            f"taking the {what} {chosen.label or 'at the top'}, not the others; {instead} after its name takes those"
        ]
    if not chosen.averaged and (nameless := _nameless_averages(tensors)):
        return [f"taking the weights as they are; the averaged ones ({nameless[0]}) are stored without their names"]
    return []


def _nameless_averages(tensors: Mapping[str, Shaped]) -> list[str]:
    """Lists of averaged weights, in the order of parameters that nobody knows."""
    return sorted(
        {
            label
            for label, _, last in (name.rpartition(".") for name in tensors)
            if last.isdigit() and _is_averaged(label)
        }
    )


def _listed(found: list[FoundNetwork]) -> str:
    return ", ".join(network.summary for network in found)
