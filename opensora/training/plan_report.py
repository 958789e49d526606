"""What a training run would take, in plain data and on one screen; GB are 1024^3 bytes."""

import dataclasses
from pathlib import Path
from typing import Any

from opensora.distributed.checkpoint import newest_checkpoint
from opensora.planning.report import gigabytes
from opensora.training.config import Recipe
from opensora.training.plan import TrainingPlan

_ROWS = 8  # of the table of batches


def describe_plan(plan: TrainingPlan, recipe: Recipe, folder: Path, price: float | None) -> dict[str, Any]:
    """A plan as plain JSON values; sizes are bytes, times seconds.

    Args:
        plan: of the recipe.
        recipe: what would run.
        folder: where; a run that is there is resumed.
        price: of an hour of one device; None if that is not asked for.
    """
    checkpoint = newest_checkpoint(folder / "checkpoints")[0]
    loop, fits = recipe.loop, plan.fits()
    step_s = plan.step_s()
    hours = None if step_s is None else step_s * loop.steps * plan.world_size / 3600
    return {
        "recipe": recipe.name,
        "folder": str(folder),
        "resumes_from": None if checkpoint is None else checkpoint.name,
        "device": dataclasses.asdict(plan.device),
        "world_size": plan.world_size,
        "sharded": plan.is_sharded,
        "sequence_parallel": loop.sequence_parallel,
        "microbatches": loop.microbatches,
        "precision": loop.precision,
        "activation_checkpointing": loop.activation_checkpointing,
        "parameters": [dataclasses.asdict(network) for network in plan.parameters()],
        "memory": dataclasses.asdict(plan.memory),
        "fits": fits,
        "ways_to_fit": [] if fits else [{"options": o, "total": way.memory.total} for o, way in plan.ways_to_fit()],
        "smaller_batches": {} if fits else plan.smaller_batches(),
        "batches": [
            {**dataclasses.asdict(cost.shape), **{k: v for k, v in dataclasses.asdict(cost).items() if k != "shape"}}
            for cost in plan.batches
        ],
        "step": {
            "clips": plan.mean(lambda cost: cost.shape.batch_size) * loop.microbatches * plan.num_data_ranks,
            "tokens": plan.mean(lambda cost: cost.tokens or 0) * plan.num_data_ranks,
            "flops": plan.mean(lambda cost: cost.flops),
            "recomputed_flops": plan.mean(lambda cost: cost.recomputed_flops),
            "frozen_flops": plan.mean(lambda cost: cost.frozen_flops),
            "sent_bytes": plan.mean(lambda cost: cost.sent_bytes),
            "switched_bytes": plan.mean(lambda cost: cost.switched_bytes),
            "sending_s": plan.mean(lambda cost: cost.sending_s or 0.0),
            "seconds": step_s,
            "mfu": plan.mfu,
            "logged_mfu": plan.logged_mfu(),
        },
        "run": {
            "steps": loop.steps,
            "hours": None if hours is None else hours / plan.world_size,
            "device_hours": hours,
            "cost": None if hours is None or price is None else hours * price,
        },
    }


def plan_lines(report: dict[str, Any]) -> list[str]:
    """What `describe_plan` tells, on one screen."""
    return [
        *_head(report),
        "",
        *_parameters(report["parameters"]),
        "",
        *_memory(report),
        "",
        *_batches(report),
        "",
        *_time(report),
    ]


def _head(report: dict[str, Any]) -> list[str]:
    ranks, device = report["world_size"], report["device"]["name"]
    where = f"{ranks} x {device}" if ranks > 1 else ("this machine's CPU" if device == "cpu" else f"one {device}")
    how = [report["precision"]]
    how += ["weights sharded over all ranks"] if report["sharded"] else []
    how += [f"clips shared by {report['sequence_parallel']} ranks"] if report["sequence_parallel"] > 1 else []
    how += [f"{report['microbatches']} microbatches"] if report["microbatches"] > 1 else []
    how += [f"activation checkpointing {report['activation_checkpointing']}"]
    return [f"{report['recipe']} on {where}", f"{', '.join(how)}; GB are 1024^3 bytes"]


def _parameters(networks: list[dict[str, Any]]) -> list[str]:
    lines = [f"{'parameters':<24}{'trained':>16}{'frozen':>16}"]
    for network in networks:
        lines.append(f"{network['name'].replace('_', ' '):<24}{network['trained']:>16,}{network['frozen']:>16,}")
    return lines


def _memory(report: dict[str, Any]) -> list[str]:
    memory, has = report["memory"], report["device"]["memory_bytes"]
    share = f" 1/{report['world_size']}" if report["sharded"] else ""
    parts = {
        "weights": f"weights{share}",
        "gradients": f"gradients{share}",
        "optimizer": f"optimiser{share}",
        "average": f"average of weights{share}",
        "critic": "critic and its optimiser",
        "frozen": "frozen networks",
        "activations": f"activations, {memory['worst']}",
        "preparation": "frozen networks at work",
        "communication": "gathered and sent",
        "checkpoint": "checkpoint being written",
        "surcharge": "process and allocator",
    }
    lines = [f"{'memory of a rank':<36}"]
    lines += [f"{name:<36}{gigabytes(memory[part]):>9}" for part, name in parts.items() if memory[part]]
    verdict = "fits" if report["fits"] else "does not fit"
    lines.append(f"{'at the worst moment':<36}{gigabytes(memory['total']):>9} of {gigabytes(has)}: {verdict}")
    return lines


def _batches(report: dict[str, Any]) -> list[str]:
    step, timed = report["step"], report["step"]["seconds"] is not None
    head = ("a step of each rank", "share", "clips", "tokens", "TFLOP", "recomputed", "frozen", "seconds" * timed)
    lines = ["{:<24}{:>7}{:>7}{:>10}{:>10}{:>12}{:>9}{:>9}".format(*head).rstrip()]

    def weight(batch: dict[str, Any]) -> float:
        return batch["share"] * (batch["flops"] + batch["recomputed_flops"] + batch["frozen_flops"])

    shown = sorted(report["batches"], key=weight, reverse=True)[:_ROWS]
    for batch in shown:
        lines.append(
            f"{batch['label']:<24}{batch['share']:>7.1%}{batch['batch_size'] * report['microbatches']:>7}"
            f"{'-' if batch['tokens'] is None else format(batch['tokens'], ','):>10}{_work(batch)}"
            f"{_seconds(batch['seconds']):>9}"
        )
    left = len(report["batches"]) - len(shown)
    if left:
        lines.append(f"and {left} sizes that take less")
    data_ranks = report["world_size"] // report["sequence_parallel"]
    clips, tokens = step["clips"] / data_ranks, step["tokens"] / data_ranks
    lines.append(
        f"{'mean':<31}{clips:>7.0f}{format(round(tokens), ',') if tokens else '-':>10}{_work(step)}"
        f"{_seconds(step['seconds']):>9}"
    )
    if report["world_size"] > 1:
        lines.append(_sent(step))
    return lines


def _work(cost: dict[str, Any]) -> str:
    return f"{_tera(cost['flops']):>10}{_tera(cost['recomputed_flops']):>12}{_tera(cost['frozen_flops']):>9}"


def _sent(step: dict[str, Any]) -> str:
    parts = f"{gigabytes(step['sent_bytes'])} of weights and gradients"
    if step["switched_bytes"]:
        parts += f", {gigabytes(step['switched_bytes'])} of shared clips"
    return f"sent by each rank: {parts}" + (f", {step['sending_s']:.2g} s" if step["sending_s"] else "")


def _time(report: dict[str, Any]) -> list[str]:
    step, run, device = report["step"], report["run"], report["device"]
    start = f"resumes from {report['resumes_from']}" if report["resumes_from"] else "starts at step 0"
    first = f"{run['steps']:,} steps in {report['folder']}, {start}"
    if step["seconds"] is None:
        return [first, "no time is known: nobody measured this CPU; set loop.peak_tflops to what it can do"]
    peak = f"{device['peak_tflops']:g} TFLOP/s" if device["peak_tflops"] else "loop.peak_tflops"
    cost = "" if run["cost"] is None else f", which cost {run['cost']:,.2f}"
    return [
        first,
        f"{step['seconds']:.3g} s a step at {step['mfu']:.0%} of {peak} (would be logged as mfu "
        f"{step['logged_mfu']:.2f}: without what is recomputed or frozen)",
        f"{_duration(run['hours'])}: {run['device_hours']:,.1f} hours of a device{cost}",
    ]


def advice(report: dict[str, Any]) -> str:
    """What makes a run fit that does not."""
    ways = [f"{' '.join(way['options'])} ({gigabytes(way['total'])})" for way in report["ways_to_fit"]]
    smaller = {label: size for label, size in report["smaller_batches"].items() if size}
    if smaller:
        sizes = ", ".join(f"{size} of {label}" for label, size in smaller.items())
        ways.append(f"smaller batches ({sizes})")
    if ways:
        return f"it fits with {', or with '.join(ways)}"
    return "choose a larger device, or encode beforehand by opensora data precompute"


def _tera(flops: float) -> str:
    return "-" if not flops else f"{flops / 1e12:,.0f}" if flops >= 1e14 else f"{flops / 1e12:.3g}"


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.3g}"


def _duration(hours: float) -> str:
    return (
        f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
    )
