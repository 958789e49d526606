"""What a clip would take on a device, and which choices make it fit: as plain data, and on one screen."""

import dataclasses
from dataclasses import replace
from typing import Any

import torch

from opensora.checkpoints.precision import dtype_named
from opensora.planning.meta_pipeline import MetaPipeline
from opensora.planning.planner import ACCELERATOR, CPU, OFFLOADS, Planner
from opensora.planning.stages import COMPONENT_OF, Choices, Clip, branches_of
from opensora.planning.tracing import Tracer

CHOICES = ("dtype", "offload", "sequential_guidance", "micro_batch_size", "tile_frames")
"""What a user may choose so that a clip fits, by the names of `Engine.load` and `ClipRequest`."""


def plan_clip(
    tracer: Tracer,
    meta: MetaPipeline,
    clip: Clip,
    *,
    device: str,
    dtype: torch.dtype | None = None,
    memory_bytes: int | None = None,
) -> dict[str, Any]:
    """What a clip will take, and which choices make it fit, as plain JSON values; sizes are bytes.

    Args:
        tracer: counts.
        meta: the model, on meta tensors.
        clip: what is to be made.
        device: where; "cpu" or any accelerator.
        dtype: numbers the networks compute in; None for the device's usual ones, or less if those do not fit.
        memory_bytes: what the device has; None for a plan that asks for no verdict.
    """
    on_cpu = device == "cpu"
    planner = Planner(tracer, meta.pipeline, clip, CPU if on_cpu else ACCELERATOR)

    chosen = dtype or dtype_named(None, on_cpu=on_cpu)
    default = planner.default(chosen)
    smallest = planner.smallest(default)
    ways = dict.fromkeys([*(replace(default, offload=offload) for offload in OFFLOADS), smallest])
    if dtype is None:
        ways[replace(default, dtype=torch.int8, offload="networks")] = None
    plan = {
        "model": meta.name,
        "clip": str(clip.size),
        "guided": clip.guided,
        "branches": len(branches_of(meta.pipeline, clip)),
        "device": device,
        "dtype": _name(chosen),
        "stages": [
            {
                "network": COMPONENT_OF[stage.name],
                **dataclasses.asdict(stage),
                "activation_bytes_in_portions": in_portions.activation_bytes,
            }
            for stage, in_portions in zip(planner.stages(default), planner.stages(smallest), strict=True)
        ],
        "ways": [_way(planner, choices, default) for choices in ways],
    }
    if memory_bytes is None:
        return plan
    # Less precision is proposed only to those who did not choose.
    dtypes = [chosen] if dtype else list(dict.fromkeys([chosen, torch.bfloat16, torch.int8]))
    found = planner.find(memory_bytes, dtypes)
    if found is not None:
        return {**plan, "device_memory_bytes": memory_bytes, "fits": True, "with": _way(planner, found, default)}
    smallest = planner.smallest(planner.default(dtypes[-1]))
    needed = {
        stage.name: planner.surcharge.total_bytes(*stage.bytes(smallest.offload)) for stage in planner.stages(smallest)
    }
    too_large = {name: size for name, size in needed.items() if size > memory_bytes}
    refused = {"fits": False, "smallest": _way(planner, smallest, default), "too_large": too_large}
    return {**plan, "device_memory_bytes": memory_bytes, **refused}


def _way(planner: Planner, choices: Choices, default: Choices) -> dict[str, Any]:
    """What some choices take, and where they differ from the usual ones."""
    weight_bytes, activation_bytes = planner.peak(choices)
    return {
        "choices": differing_choices(choices, default),
        "weight_bytes": weight_bytes,
        "activation_bytes": activation_bytes,
        "needed_bytes": planner.needed_bytes(choices),
    }


def differing_choices(choices: Choices, default: Choices) -> dict[str, Any]:
    """Choices that are not the usual ones, as plain values."""
    named, usual = ({**dataclasses.asdict(made), "dtype": _name(made.dtype)} for made in (choices, default))
    return {name: named[name] for name in CHOICES if named[name] != usual[name]}


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """What `plan_clip` tells, on one screen; names of choices and wishes stand in backticks."""
    where = "on the CPU" if plan["device"] == "cpu" else f"on {_article(plan['device'])}"
    count = plan["branches"]
    in_words = {1: "one branch", 2: "two branches", 3: "three branches"}.get(count, f"{count} branches")
    branches = f"{in_words} of guidance" if plan["guided"] else "no guidance"
    lines = [f"{plan['model']}: {plan['clip']}", f"{branches}, {plan['dtype']} {where}; GB are 1024^3 bytes", ""]
    lines.append(f"{'stage':<9}{'network':<14}{'weights':>10}{'activations':>14}{'in small portions':>20}")
    for stage in plan["stages"]:
        sizes = (stage["weight_bytes"], stage["activation_bytes"], stage["activation_bytes_in_portions"])
        weights, activations, in_portions = (gigabytes(value) for value in sizes)
        network = stage["network"].replace("_", " ")
        lines.append(f"{stage['name']:<9}{network:<14}{weights:>10}{activations:>14}{in_portions:>20}")
    lines += ["", f"{'in all':>10}   options of generate (what the process itself takes is included)"]
    lines += [
        f"{gigabytes(way['needed_bytes']):>10}   {choices_in_words(way['choices']) or 'none'}" for way in plan["ways"]
    ]
    return lines if "fits" not in plan else [*lines, "", verdict_of(plan)]


def verdict_of(plan: dict[str, Any]) -> str:
    """Whether it fits into the memory that was asked about, and how; names stand in backticks."""
    memory = gigabytes(plan["device_memory_bytes"])
    if plan["fits"]:
        way = plan["with"]
        how = f"with {choices_in_words(way['choices'])}" if way["choices"] else "as it is"
        return f"fits into {memory} {how}: {gigabytes(way['needed_bytes'])}"
    choices, too_large = choices_in_words(plan["smallest"]["choices"]), plan["too_large"]
    needs = ", ".join(f"{name} still takes {gigabytes(size)}" for name, size in too_large.items())
    advice = "a smaller `text_encoder`" if "text" in too_large else "fewer `num_frames` or a smaller `resolution`"
    return f"does not fit into {memory}: with {choices} {needs}; choose {advice}"


def _article(device: str) -> str:
    return "an accelerator" if device == "accelerator" else device


def choices_in_words(choices: dict[str, Any]) -> str:
    """``"`dtype` bfloat16 `offload`"``."""
    return " ".join(f"`{name}`" if chosen is True else f"`{name}` {chosen}" for name, chosen in choices.items())


def gigabytes(num_bytes: float) -> str:
    """`"4.2 GB"`, `"300 MB"`; units are powers of 1024."""
    return f"{num_bytes / 2**30:.1f} GB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MB"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
