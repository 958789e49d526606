"""Adapters written as the tools of the field read them: diffusers, PEFT, kohya (sd-scripts, musubi) and ComfyUI.

All hold the same matrices under other names, and state alpha in their own way: diffusers and PEFT in a configuration,
the others in a tensor of every layer. What is known of the origin lies in the metadata of all of them.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from opensora.adapters.adapter import ORIGIN_KEY, Adapter
from opensora.adapters.reading import ADAPTER_FILE, PEFT_CONFIG, PEFT_FILE
from opensora.errors import OpenSoraError
from opensora.files import replacing, replacing_folder

LAYOUTS = ("diffusers", "peft", "kohya", "comfyui")
"""Tools whose layouts are written."""

PREFIX = "transformer."
"""diffusers' name of the network that an adapter is for."""

_DIFFUSERS_KEY = "lora_adapter_metadata"


def write_adapter(adapter: Adapter, output: Path, layout: str = "diffusers") -> Path:
    """Writes an adapter, whole or not at all.

    Args:
        adapter: under the names of its network.
        output: a folder for "diffusers" and "peft", the file to be for "kohya" and "comfyui"; "diffusers" takes a file
            that ends in `.safetensors` as well.
        layout: which tool it is for, one of `LAYOUTS`.

    Returns:
        The file of its tensors.

    Raises:
        OpenSoraError: something that the layout has no place for, or an output of another kind.
    """
    output, is_file = Path(output), Path(output).suffix == ".safetensors"
    if layout in ("kohya", "comfyui") and not is_file:
        raise OpenSoraError(f"output {output}: an adapter for {layout} is one file; name it NAME.safetensors")
    if layout == "peft" and is_file:
        raise OpenSoraError(f"output {output}: an adapter for PEFT is a folder; leave out .safetensors")
    if adapter.differences and layout != "comfyui":
        raise OpenSoraError(
            f"{adapter.path} changes {len(adapter.differences)} biases or whole weights, such as "
            f"{next(iter(adapter.differences))}, which {layout} has no place for; expected low-rank matrices alone"
        )
    metadata = {"format": "pt"}
    if adapter.origin is not None:
        metadata[ORIGIN_KEY] = json.dumps(asdict(adapter.origin), sort_keys=True)
    if layout == "diffusers":
        config = {PREFIX + key: value for key, value in peft_config(adapter).items()}
        metadata[_DIFFUSERS_KEY] = json.dumps(config, sort_keys=True)
        return _save(_pairs(adapter, PREFIX), output if is_file else output / ADAPTER_FILE, metadata)
    if layout == "peft":
        config = {**_peft_defaults(adapter), **peft_config(adapter)}
        with replacing_folder(output) as folder:
            text = json.dumps(config, indent=2, sort_keys=True) + "\n"
            (folder / PEFT_CONFIG).write_text(text, encoding="utf-8")
            _save(_pairs(adapter, "base_model.model."), folder / PEFT_FILE, metadata)
        return output / PEFT_FILE
    if layout == "kohya":
        alphas = Counter(adapter.alphas.values()).most_common(1)
        metadata |= {"ss_network_module": "networks.lora", "ss_network_dim": str(adapter.rank)}
        metadata |= {"ss_network_alpha": f"{alphas[0][0]:.17g}"} if alphas else {}
        flat = {layer: "lora_unet_" + layer.replace(".", "_") for layer in adapter.layers}
        if len(set(flat.values())) < len(flat):
            raise OpenSoraError(f"{adapter.path} changes layers whose names are one without dots; kohya cannot hold it")
        return _save(_with_alphas(adapter, flat), output, metadata)
    tensors = _with_alphas(adapter, {layer: f"diffusion_model.{layer}" for layer in adapter.layers})
    for parameter, difference in adapter.differences.items():
        layer, _, kind = parameter.rpartition(".")
        tensors[f"diffusion_model.{layer}.{'diff' if kind == 'weight' else 'diff_b'}"] = difference
    return _save(tensors, output, metadata)


def lora_state(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of an adapter under diffusers' names."""
    return _pairs(adapter, PREFIX)


def peft_config(adapter: Adapter) -> dict[str, Any]:
    """PEFT's configuration: what most layers have, and patterns for the others."""
    ranks = {layer: len(a) for layer, (a, _) in adapter.layers.items()}
    rank, alpha = (Counter(of.values()).most_common(1)[0][0] for of in (ranks, adapter.alphas))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _whole(alpha),
        "lora_dropout": 0.0,
        "target_modules": sorted(ranks),
    }
    for key, values, usual in (("rank_pattern", ranks, rank), ("alpha_pattern", adapter.alphas, alpha)):
        if others := {f"^{layer}": _whole(value) for layer, value in values.items() if value != usual}:
            config[key] = others
    return config


def _peft_defaults(adapter: Adapter) -> dict[str, Any]:
    """What PEFT writes besides, and others may look for."""
    base = None if adapter.origin is None else adapter.origin.base
    plain = {"bias": "none", "fan_in_fan_out": False, "use_rslora": False, "use_dora": False, "modules_to_save": None}
    return {"task_type": None, "base_model_name_or_path": base, "inference_mode": True, **plain}


def _pairs(adapter: Adapter, prefix: str) -> dict[str, Tensor]:
    named = {f"{prefix}{layer}.lora_": pair for layer, pair in adapter.layers.items()}
    return {f"{name}{which}.weight": t for name, pair in named.items() for which, t in zip("AB", pair, strict=True)}


def _with_alphas(adapter: Adapter, names: Mapping[str, str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for layer, (a, b) in adapter.layers.items():
        name, alpha = names[layer], torch.tensor(adapter.alphas[layer], dtype=torch.float64)
        exact = bool(alpha.float().double() == alpha)  # else in float64, which readers take as well
        tensors[f"{name}.lora_down.weight"] = a
        tensors[f"{name}.lora_up.weight"] = b
        tensors[f"{name}.alpha"] = alpha.float() if exact else alpha
    return tensors


def _save(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, partial, metadata)
    return file


def _whole(value: float) -> float:
    """An int where it is one, as people write it."""
    return int(value) if float(value).is_integer() else value
