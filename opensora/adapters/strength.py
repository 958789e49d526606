"""How strongly an adapter acts: alpha / rank of every layer, from wherever a file states it.

In this order: an `alpha` tensor of the layer (kohya, ComfyUI), PEFT's configuration beside the file or in its metadata
(diffusers), single numbers in the metadata (`lora_alpha`, `ss_network_alpha`). The rank is that of the matrices. Where
nothing is stated, alpha is taken as the rank, as every reader of such files does, and that is said; so is a statement
that another one contradicts. rsLoRA (Kalajdzievski, 2023) divides by the root of the rank.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opensora.contents import describe_value, parse_json, shown
from opensora.errors import OpenSoraError

PEFT_KEYS = ("lora_adapter_metadata", "lora_config", "adapter_config", "peft_config")
"""Keys of a file's metadata under which PEFT's configuration lies: that of diffusers, and those of training scripts."""

_ALPHA_KEYS = ("lora_alpha", "network_alpha", "alpha", "ss_network_alpha")
_RANK_KEYS = ("lora_rank", "network_dim", "rank", "r", "ss_network_dim")
_UNSTATED = ("", "none", "null", "dynamic")  # kohya's words for ranks that differ, and for none
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # where training began with another base
_REFUSED_OPTIONS = {
    "use_dora": "DoRA",
    "fan_in_fan_out": "transposed weights (fan_in_fan_out)",
    "layer_replication": "layers that are there several times (layer_replication)",
    "modules_to_save": "whole layers beside LoRA (modules_to_save)",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "LoRA of bare parameters (target_parameters)",
    "use_qalora": "QA-LoRA",
    "alora_invocation_tokens": "activated LoRA",
}
_UNSAFE_PATTERN = re.compile(r"\)[*+?{]|\{|\\[1-9]|\(\?")  # what can take forever to match
_MOST_PATTERNS, _MOST_REPEATING, _LONGEST_PATTERN = 4096, 32, 300


@dataclass(frozen=True)
class Statement:
    """What one place says of all layers.

    Attributes:
        where: the place, for a message.
        alpha: of all layers, if it is stated.
        rank: of all layers, if it is stated.
        alphas: layers' names -> alpha.
        ranks: layers' names -> rank.
        by_root: whether alpha is divided by the root of the rank.
        of_most: whether some layers may differ from what is said of all.
    """

    where: str
    alpha: float | None = None
    rank: int | None = None
    alphas: Mapping[re.Pattern[str], float] = field(default_factory=dict)
    ranks: Mapping[re.Pattern[str], float] = field(default_factory=dict)
    by_root: bool = False
    of_most: bool = False

    def alpha_of(self, layer: str, rank: int) -> float | None:
        """What alpha / rank is to be divided of, by the rank itself; None if nothing is said."""
        alpha = _matching(self.alphas, layer)
        alpha = self.alpha if alpha is None else alpha
        if alpha is None:
            return None
        return alpha * math.sqrt(rank) if self.by_root else alpha

    def rank_of(self, layer: str) -> int | None:
        """The rank that is stated for a layer."""
        rank = _matching(self.ranks, layer)
        return self.rank if rank is None else int(rank)


@dataclass(frozen=True)
class Strength:
    """alpha of every layer.

    Attributes:
        alphas: layer -> what B A is multiplied by, times its rank.
        stated: where that stands; None where it is guessed for all of them.
        notes: what is guessed or contradicted, a sentence each.
    """

    alphas: dict[str, float]
    stated: str | None
    notes: tuple[str, ...] = ()


def find_strength(ranks: Mapping[str, int], tensors: Mapping[str, float], statements: Sequence[Statement]) -> Strength:
    """Weighs what is stated.

    Args:
        ranks: layer -> rank of its matrices.
        tensors: layer -> value of its alpha tensor.
        statements: of other places, the more trusted ones first.

    Raises:
        OpenSoraError: an alpha of 0, with which an adapter changes nothing.
    """
    alphas: dict[str, float] = {}
    used: Counter[str] = Counter()
    agreeing: Counter[str] = Counter()
    contradicted: dict[str, str] = {}
    for layer, rank in ranks.items():
        said = [("its alpha tensors", tensors[layer])] if layer in tensors else []
        said += [(s.where, alpha) for s in statements if (alpha := s.alpha_of(layer, rank)) is not None]
        place, alphas[layer] = said[0] if said else ("", float(rank))
        used[place] += 1
        if not alphas[layer]:
            raise OpenSoraError(
                f"alpha of {layer} is 0 in {place}, so that it changes nothing; expected another number"
            )
        for other, alpha in said[1:]:
            if math.isclose(alpha, alphas[layer], rel_tol=1e-6):
                agreeing[other] += 1
            else:
                text = f"alpha is {alphas[layer]:g} in {place} and {alpha:g} in {other}; took the former"
                contradicted.setdefault(other, text)
    for statement in statements:
        if statement.of_most and agreeing[statement.where]:  # kohya's files give convolutions an alpha of their own
            contradicted.pop(statement.where, None)
    notes = [*contradicted.values(), *_wrong_ranks(ranks, statements)]
    if guessed := used.pop("", 0):
        of = "" if guessed == len(ranks) else f" for {guessed} of {len(ranks)} layers"
        notes.append(f"its strength is guessed{of}: alpha is not stated, and taken as the rank (alpha / rank = 1)")
    return Strength(alphas, " and ".join(used) or None, tuple(notes))


def _wrong_ranks(ranks: Mapping[str, int], statements: Sequence[Statement]) -> list[str]:
    notes = []
    for statement in statements:
        wrong = {layer: s for layer, r in ranks.items() if (s := statement.rank_of(layer)) is not None and s != r}
        if wrong and not (statement.of_most and len(wrong) < len(ranks)):
            layer, stated = next(iter(wrong.items()))
            notes.append(
                f"the rank is {stated} in {statement.where}, and {ranks[layer]} in the matrices of {layer} "
                f"({len(wrong)} of {len(ranks)} layers); took that of the matrices"
            )
    return notes


# --- what is stated ---------------------------------------------------------------------------------------------------


def statements_of(
    file: str, metadata: Mapping[str, str], config: Mapping[str, Any] | None, config_name: str
) -> list[Statement]:
    """What is said beside the tensors, the more trusted places first.

    Args:
        file: what to call the file in an error.
        metadata: of a safetensors file.
        config: PEFT's configuration beside the file.
        config_name: of that file.

    Raises:
        OpenSoraError: values of other kinds than expected, or a method that is not plain LoRA.
    """
    found = [] if config is None else [_of_peft(config, config_name)]
    for key in PEFT_KEYS:
        if key in metadata and metadata[key].lower() not in _UNSTATED:
            found.append(_of_peft(_of_transformer(json_of(file, metadata, key)), f"its metadata {key}"))
    for alpha_key in _ALPHA_KEYS:
        alpha = _number(file, metadata, alpha_key)
        if alpha is not None:
            found.append(Statement(f"its metadata {alpha_key}", alpha, of_most=True))
    for rank_key in _RANK_KEYS:
        rank = _number(file, metadata, rank_key)
        if rank is not None:
            found.append(Statement(f"its metadata {rank_key}", rank=int(rank), of_most=True))
    return [s for s in found if s.alpha is not None or s.alphas or s.rank is not None or s.ranks]


def stated_among(numbers: Mapping[str, float]) -> dict[str, str]:
    """What of the numbers that lie in a pickle, by dotted names, speaks of LoRA, as if it were metadata."""
    stated: dict[str, str] = {}
    for name, value in numbers.items():
        leaf = name.rpartition(".")[2]
        if leaf in _ALPHA_KEYS + _RANK_KEYS and (leaf == name or leaf not in ("alpha", "rank", "r")):
            stated.setdefault(leaf, repr(float(value)))
    return stated


def json_of(file: str, metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """The object in a file's metadata; empty if there is none.

    Raises:
        OpenSoraError: it is none.
    """
    try:
        values = parse_json(metadata.get(key, "{}"), f"its metadata {key!r}")
    except OpenSoraError as error:
        raise OpenSoraError(f"{file} is damaged, {key!r} in its metadata is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise OpenSoraError(f"{file}: its metadata {key!r} is not an object; the adapter is damaged")
    return values


def _of_transformer(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options without the name of the network that diffusers puts before them (`transformer.r`)."""
    kept = {key: value for key, value in config.items() if not key.startswith("text_encoder")}
    return {key.rpartition(".")[2]: value for key, value in kept.items()}


def _of_peft(config: Mapping[str, Any], where: str) -> Statement:
    kind = config.get("peft_type") or "LORA"
    if str(kind).upper() != "LORA":
        raise OpenSoraError(f"{where} says peft_type {shown(kind)}, which is not supported; expected plain LoRA")
    for option, what in _REFUSED_OPTIONS.items():
        if config.get(option):
            raise OpenSoraError(f"{where} says {option}: {what}, which is not supported; expected plain LoRA")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_THE_BASE):
        raise OpenSoraError(
            f"{where} says init_lora_weights {start!r}: the adapter belongs to a base that was changed by it; "
            "convert it to plain LoRA with PEFT (path_initial_model_for_weight_conversion)"
        )
    alpha, rank = config.get("lora_alpha"), config.get("r")
    if alpha is not None:
        alpha = _checked(alpha, f"{where}: lora_alpha")
    if rank is not None:
        rank = int(_checked(rank, f"{where}: r"))
    patterns = {key: _pattern_values(config, key, where) for key in ("alpha_pattern", "rank_pattern")}
    by_root = bool(config.get("use_rslora"))
    return Statement(where, alpha, rank, patterns["alpha_pattern"], patterns["rank_pattern"], by_root)


def _pattern_values(config: Mapping[str, Any], key: str, where: str) -> dict[re.Pattern[str], float]:
    values = config.get(key) or {}
    if not isinstance(values, dict):
        raise OpenSoraError(f"{where}: {key} is {describe_value(values)}, expected an object of names and numbers")
    if len(values) > _MOST_PATTERNS or sum(bool(re.search(r"[*+]", name)) for name in values) > _MOST_REPEATING:
        raise OpenSoraError(
            f"{where}: {key} has {len(values)} entries; expected {_MOST_PATTERNS} names at most, and {_MOST_REPEATING} "
            "with * or +"
        )
    checked = {name: _checked(value, f"{where}: {key} of {shown(name)}") for name, value in values.items()}
    return {_pattern(name, f"{where}: {key}"): value for name, value in checked.items()}


def _pattern(name: str, where: str) -> re.Pattern[str]:
    """As PEFT matches them: all of a layer's name, or its last parts."""
    repeats = len(re.findall(r"[*+]", name.removeprefix(".*").removesuffix(".*")))
    if len(name) > _LONGEST_PATTERN or repeats > 1 or _UNSAFE_PATTERN.search(name):
        raise OpenSoraError(f"{where} has the pattern {shown(name)!r}; expected the name of a layer")
    before = "" if name.startswith(".*") else r"(.*\.)?"
    try:
        return re.compile(rf"{before}({name})$")
    except re.error as error:
        raise OpenSoraError(f"{where} has {shown(name)!r}, which is no pattern: {error}") from None


def _checked(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise OpenSoraError(f"{what} is {describe_value(value)}, expected a number")
    return value


def _number(file: str, metadata: Mapping[str, str], key: str) -> float | None:
    text = metadata.get(key, "").strip()
    if text.lower() in _UNSTATED:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise OpenSoraError(f"{file}: its metadata {key} is {shown(repr(text))}, expected a number")
    return value


def _matching(patterns: Mapping[re.Pattern[str], float], layer: str) -> float | None:
    """The value of the first pattern that matches a layer."""
    return next((value for pattern, value in patterns.items() if pattern.match(layer)), None)
