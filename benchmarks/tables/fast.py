"""What `generate --fast` costs: `python -m benchmarks fast ROWS.jsonl` makes a table of docs/performance.md.

Clips of held-out toy prompts are made exactly, with every way of --fast, and with as few steps as cost as much, all
from the same noise. Told are evaluations of the network, decibels against the exact clip, and what the judge reads
right; 95 % intervals. ROWS.jsonl is kept batch by batch, and the same command goes on from there.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from opensora.evaluation.intervals import mean_interval
from opensora.evaluation.judge import load_judge
from opensora.evaluation.psnr import frame_psnr
from opensora.evaluation.suites import SuitePrompt, read_suite
from opensora.generation.clip import Clip
from opensora.generation.engine import Engine
from opensora.generation.request import ClipRequest
from opensora.lab.measuring import video_of
from opensora.lab.rows import Row, keep_row, read_rows
from opensora.sampling.forecast_plan import FAST


def columns(engine: Engine) -> dict[str, ClipRequest]:
    """Name -> request without a prompt: the exact clip first, each way of --fast with its number of steps beside it."""
    exact = ClipRequest("")
    (prepared,) = engine.prepare([dataclasses.replace(exact, prompt="a ball")])
    num_steps = int(prepared.sampling.num_inference_steps)
    found = {"exact": exact}
    for name, share in FAST.items():
        found[name] = dataclasses.replace(exact, fast=name)
        steps = int(share * num_steps)
        found[f"{steps} steps"] = dataclasses.replace(exact, num_inference_steps=steps)
    return found


def rows_of(engine: Engine, judge, prompts: list[SuitePrompt], requests: dict[str, ClipRequest]) -> list[Row]:
    """Every column's clips of some prompts, measured."""
    rows: list[Row] = []
    exact: list[Clip] = []
    for name, request in requests.items():
        wanted = [dataclasses.replace(request, prompt=prompt.text, seed=prompt.seed(0)) for prompt in prompts]
        clips = engine.make_batch(engine.prepare(wanted))
        exact = exact or clips
        for prompt, clip, reference in zip(prompts, clips, exact, strict=True):
            video = video_of(clip)
            decibels = float(frame_psnr(video, video_of(reference)).mean())
            right = judge.read(video)[0] == prompt.wanted
            told = {"column": name, "prompt": prompt.id, "evaluations": clip.num_evaluations}
            rows.append({"cell": f"{name}/{prompt.id}", **told, "psnr_db": decibels, "right": float(right)})
    return rows


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks fast", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path)
    parser.add_argument("--model", default="toybox")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args(argv)
    engine, judge = Engine.load(ClipRequest("", model=args.model, dtype=args.dtype)), load_judge()
    prompts, requests = read_suite("toybox", args.prompts), columns(engine)
    for start in range(0, len(prompts), args.batch_size):
        batch = prompts[start : start + args.batch_size]
        kept = read_rows(args.rows)
        if not all(f"{name}/{prompt.id}" in kept for name in requests for prompt in batch):
            for row in rows_of(engine, judge, batch, requests):
                keep_row(args.rows, row)
            print(f"{start + len(batch)} of {len(prompts)} prompts", flush=True)
    kept = read_rows(args.rows)
    print(f"{'':10}  evaluations  dB against exact      worst of 20  read right, %")
    for name in requests:
        rows = [kept[f"{name}/{prompt.id}"] for prompt in prompts]
        ids = [row["prompt"] for row in rows]
        decibels, right = ([row[figure] for row in rows] for figure in ("psnr_db", "right"))
        worst = sorted(decibels)[len(decibels) // 20]
        shares = mean_interval([100 * value for value in right], ids)
        print(f"{name:10}  {rows[0]['evaluations']:11}  {mean_interval(decibels, ids)!s:20}  {worst:11.1f}  {shares}")
