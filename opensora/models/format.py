"""What is true of one family of networks alone, in one object that stands beside its network.

How its files are recognised, what their configurations and names become here, and which parts training may add
or leave alone: whoever needs to know asks the `Format`, and names no network. `families` lists them.
"""

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from torch import Tensor, nn
from transformers import PretrainedConfig

from opensora.errors import OpenSoraError

Kind = Literal["transformer", "autoencoder", "text_encoder"]


def kind_of_place(place: str) -> Kind:
    """What a component is, whichever it is of several: "text_encoder" for "text_encoder_2"."""
    return cast(Kind, place.rstrip("_0123456789"))


LIBRARIES = ("diffusers", "transformers")
"""Those whose classes are components as well as this package's."""
Part = Literal["qk_norm", "temporal_blocks", "conditions", "first_layer", "last_layer"]
"""Parts of a transformer that weights may lack which training starts from."""

REFERENCE_OPTIONS = {
    "drop_path",
    "enable_flash_attn",
    "enable_flashattn",
    "enable_layernorm_kernel",
    "enable_sequence_parallelism",
    "force_huggingface",
    "freeze",
    "freeze_y_embedder",
    "from_pretrained",
    "only_train_temporal",
    "skip_y_embedder",
    "type",
}
"""Of the reference's configurations: how it computes or trains, which changes no result here."""


class Shaped(Protocol):
    """Whatever has a shape: a tensor, or what a file's header says of one."""

    @property
    def shape(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class Identity:
    """What some weights are.

    Attributes:
        kind: their place in a pipeline.
        summary: family and version in a few words.
        library: module of the class that holds them, as `model_index.json` names it; "" if there is none yet.
        class_name: that class, or the name the network is known by.
        config: keywords of the class as far as shapes tell them.
        unsure: keywords that shapes cannot tell, each with what is known about it; "spatial.norm_num_groups" is a
            keyword within a keyword.
        null_text: tokens and width of a transformer's learned null text; None without one.
        runs_as: module and name of the class that runs them, where another one holds them within.
    """

    kind: Kind
    summary: str
    library: str
    class_name: str
    config: dict[str, Any] = field(default_factory=dict)
    unsure: dict[str, str] = field(default_factory=dict)
    null_text: tuple[int, int] | None = None
    runs_as: tuple[str, str] | None = None

    @property
    def supported(self) -> bool:
        """Whether this package can run it."""
        return bool(self.library)

    @property
    def runner(self) -> tuple[str, str]:
        """Module and name of the class that runs such weights."""
        return self.runs_as or (self.library, self.class_name)


class Format:
    """What is true of one family alone; a subclass says what differs from a network that is saved by this package.

    Attributes:
        cls: the class of the network.
        kind: its place in a pipeline; None for a class that nothing is known of.
        summary: family and version in a few words.
        prefixes: every one of them begins the name of some tensor of the family's files, of no other's.
        lora_targets: parts of the names of the linear layers that get an adapter where nobody says which.
        parts: what belongs to each part that may be new, by patterns of parameters' names.
        zero_at_first: of a new part, what begins at 0, so that the part changes nothing.
        temporal: what attends along time.
        text_embedder: what projects the text, and the null text.

    Args:
        cls: the class of the network, where no subclass names it.
    """

    cls: type[nn.Module]
    kind: Kind | None = None
    summary: str
    prefixes: tuple[str, ...] = ()

    lora_targets: tuple[str, ...] = ()
    parts: Mapping[Part, re.Pattern[str]] = {}
    zero_at_first: tuple[re.Pattern[str], ...] = ()
    temporal: re.Pattern[str] | None = None
    text_embedder: re.Pattern[str] | None = None

    def __init__(self, cls: type[nn.Module] | None = None) -> None:
        if cls is not None:
            self.cls = cls

    # --- recognising ---

    def identify(self, shapes: "TensorShapes") -> Identity | None:
        """What these tensors are; None if they are no network of this family."""
        if not self.prefixes or not shapes.has(*self.prefixes):
            return None
        return self.identity(*self.read_shapes(shapes))

    def read_shapes(self, shapes: "TensorShapes") -> tuple[dict[str, Any], dict[str, str]]:
        """Keywords of the class as far as shapes tell, and what is known of those that they cannot tell."""
        return {}, {}

    def identity(self, config: dict[str, Any], unsure: dict[str, str], **more: Any) -> Identity:
        """The identity of a network of this family."""
        assert self.kind is not None, "a family that is recognised has its place in a pipeline"
        return Identity(self.kind, self.summary, self.library, self.cls.__name__, config, unsure, **more)

    @property
    def library(self) -> str:
        """Module of the class as `model_index.json` names it; libraries that export all their classes by their own."""
        library = self.cls.__module__.partition(".")[0]
        return library if library in LIBRARIES else self.cls.__module__

    # --- configurations ---

    def is_foreign_config(self, stored: Mapping[str, Any]) -> bool:
        """Whether a `config.json` is one of another library, to be translated by `translate_config`."""
        return any(name in stored for name in ("model_type", "architectures", "transformers_version"))

    def translate_config(
        self, stored: Mapping[str, Any], where: Path, base: Mapping[str, Any], assumed: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """Keywords of the class that such a `config.json` tells.

        Args:
            stored: what it holds.
            where: it lies.
            base: keywords that shapes tell.
            assumed: keywords of a published model that the weights are like.

        Raises:
            OpenSoraError: a keyword that nothing is known of, or one that this class cannot do.
        """
        return known_keywords(stored, where, self.cls, ())

    def config_of(self, identity: Identity) -> dict[str, Any] | None:
        """Keywords of the class for such weights; None if they are another network's."""
        return dict(identity.config) if identity.class_name == self.cls.__name__ else None

    def complete(self, config: Mapping[str, Any], assumed: Mapping[str, Any], where: Path) -> dict[str, Any]:
        """The keywords of a published model, corrected by those that the weights at `where` tell."""
        return {**assumed, **config}

    def assumes_published(self, config: Mapping[str, Any]) -> bool:
        """Whether what weights do not tell may be taken from the published ones of their kind without being asked."""
        return False

    def difference(self, config: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
        """Why a network of one configuration can never take the place of one of the other, as "it has ..., unlike".

        None where weights alone tell the two apart.
        """
        return None

    # --- weights ---

    def adapt_weights(self, model: nn.Module, weights: Mapping[str, Tensor], source: str) -> Mapping[str, Tensor]:
        """Weights under the names of a model of this class; those that are so already come back unchanged.

        Args:
            model: what they are for.
            weights: as stored.
            source: what to call them in a log line.
        """
        return weights

    def from_ancestor(self, model: nn.Module, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Weights of an image model or an earlier generation, which training starts from, as `model` names them."""
        return weights

    # --- parts ---

    def part_of(self, name: str) -> Part | None:
        """The part that a parameter belongs to, of those that may be new."""
        return next((part for part, pattern in self.parts.items() if pattern.search(name)), None)


class TensorShapes:
    """Questions to the names and shapes of tensors.

    Args:
        tensors: name -> anything with a shape.
    """

    def __init__(self, tensors: Mapping[str, Shaped]) -> None:
        self._shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def has(self, *prefixes: str) -> bool:
        """Whether every prefix begins some name."""
        return all(any(name.startswith(prefix) for name in self._shapes) for prefix in prefixes)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """None if there is no such tensor."""
        return self._shapes.get(name)

    def size(self, name: str, dim: int) -> int | None:
        """One dimension of a tensor; None if it is not there."""
        shape = self.shape(name) or ()
        return shape[dim] if -len(shape) <= dim < len(shape) else None

    def count(self, prefix: str) -> int | None:
        """How many entries a list of modules has: one more than its highest index; None without any."""
        pattern = re.compile(re.escape(prefix) + r"\.(\d+)(?:\.|$)")
        found = [int(match[1]) for name in self._shapes if (match := pattern.match(name))]
        return max(found) + 1 if found else None


class RenamedWeights(Mapping[str, Tensor]):
    """Other weights under other names, some left out, some replaced.

    Args:
        stored: where they come from.
        names: name here -> name there.
        replaced: tensors by name here, which stand for themselves.
    """

    def __init__(
        self, stored: Mapping[str, Tensor], names: Mapping[str, str], replaced: Mapping[str, Tensor] | None = None
    ) -> None:
        self._stored, self._replaced = stored, dict(replaced or {})
        self._names = {name: there for name, there in names.items() if name not in self._replaced}

    def __getitem__(self, name: str) -> Tensor:
        return self._replaced[name] if name in self._replaced else self._stored[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        yield from self._names
        yield from self._replaced

    def __len__(self) -> int:
        return len(self._names) + len(self._replaced)


def known_values(**values: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def known_keywords(stored: Mapping[str, Any], where: Path, cls: type, dropped: Iterable[str]) -> dict[str, Any]:
    """What of a foreign configuration is a keyword of a class.

    Raises:
        OpenSoraError: something is neither that nor among those that may be dropped.
    """
    known = set(inspect.signature(cls.__init__).parameters) - {"self"}
    notes = {"model_type", "torch_dtype", "auto_map", *PretrainedConfig().to_dict()} - known
    allowed = known | set(dropped) | notes
    unknown = sorted(name for name in stored if name not in allowed and not name.startswith("_"))
    if unknown:
        raise OpenSoraError(f"{where}: unknown option {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return {name: value for name, value in stored.items() if name in known}
