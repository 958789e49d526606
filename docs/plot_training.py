"""Draws the curves of training runs: `python docs/plot_training.py runs/A runs/B ... --output docs/images/NAME.png`."""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHOWN = ("loss", "object_psnr", "psnr", "judge_shape", "judge_motion", "judge_size", "judge_colour", "judge_background")


def read_metrics(run: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Figure -> (steps, values) of a run's `metrics.jsonl`."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        for name in SHOWN:
            if name in values:
                steps, ys = curves.setdefault(name, ([], []))
                steps.append(values["step"])
                ys.append(values[name])
    return curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    figure, axes = plt.subplots(1, len(args.runs), figsize=(4.2 * len(args.runs), 3.2), squeeze=False)
    for run, axis in zip(args.runs, axes[0], strict=True):
        curves = read_metrics(run)
        axis.semilogy(*curves["loss"], color="tab:gray", linewidth=0.8)
        axis.set(title=run.name, xlabel="step", ylabel="loss")
        others = {name: curve for name, curve in curves.items() if name != "loss"}
        if others:
            right = axis.twinx()
            for name, (steps, values) in others.items():
                right.plot(steps, values, marker=".", label=name)
            right.legend(fontsize=7)
            right.set_ylabel("dB" if "psnr" in others else "share read right")
    figure.tight_layout()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=110)


if __name__ == "__main__":
    main()
