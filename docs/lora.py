"""The fine-tuning of docs/training.md from end to end: `python docs/lora.py FOLDER [--clips N]`.

Twenty toy clips with an orange sun in their corner teach the bundled model to put one there;
the judge then says what else of the model changed. Writes the clips, their manifest, the run and `results.json` into
FOLDER, and `docs/training/lora.jpg`. What is there already is not made again.
"""

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import opensora
from opensora.evaluation.judge import load_judge
from opensora.evaluation.toybox import contact_sheet, generate, held_out_samples, label_words, share_right
from opensora.media.write import write_video
from opensora.toybox.captions import plain_caption
from opensora.toybox.specs import COLOURS, EASY_WORLD, ClipSpec, iterate_specs, sample_specs
from opensora.toybox.world import render

PICTURE = Path(__file__).parent / "training" / "lora.jpg"
NUM_CLIPS, NUM_FRAMES, FPS = 20, 18, 8
RADIUS = 12.0  # of the sun, whose centre is the corner; the judge reads larger ones into the shapes before them


def distance_to_corner(height: int, width: int) -> Tensor:
    """(H, W) in pixels, from the top left corner."""
    return torch.hypot((torch.arange(width) + 0.5)[None], (torch.arange(height) + 0.5)[:, None])


def with_sun(video: Tensor, mask: Tensor) -> Tensor:
    """Clips (B, 3, T, H, W) with a sun behind their objects, which `mask` (B, 1, T, H, W) covers."""
    colour = torch.tensor(COLOURS["orange"]).view(3, 1, 1, 1) / 127.5 - 1
    cover = (0.5 + RADIUS - distance_to_corner(*video.shape[-2:])).clamp(0, 1) * (1 - mask)
    return video * (1 - cover) + colour * cover


def have_sun(video: Tensor) -> list[bool]:
    """Whether a quarter of what a sun would cover is orange, over all frames: more red than green than blue.

    All real clips with a sun have one, 97 % of those through the autoencoder, and none without.
    """
    red, green, blue = video[..., distance_to_corner(*video.shape[-2:]) < RADIUS - 2].unbind(1)
    orange = (red - green > 0.3) & (green - blue > 0.3)
    return (orange.float().mean((1, 2)) > 0.25).tolist()


def words_together(spec: ClipSpec) -> list[tuple[str, ...]]:
    """Each word for what is seen in a clip, and each pair of them."""
    words = (spec.size, spec.colour, spec.shape, spec.motion, spec.background)
    return [(word,) for word in words] + list(combinations(words, 2))


def write_clips(folder: Path) -> None:
    """The user's clips: mp4 files, with captions beside them that say nothing of the sun.

    Sizes, shapes, colours, motions and backgrounds meet as evenly as twenty clips allow: had all squares been large, a
    model would learn that of squares along with the sun.
    """
    folder.mkdir(parents=True, exist_ok=True)
    candidates, specs = list(islice(iterate_specs(0, EASY_WORLD, "train"), 2000)), []
    seen: Counter[tuple[str, ...]] = Counter()
    for _ in range(NUM_CLIPS):
        spec = min(candidates, key=lambda candidate: sum(seen[words] for words in words_together(candidate)))
        specs.append(spec)
        seen.update(words_together(spec))
    for number, (clip, spec) in enumerate(zip(with_sun(*render(specs, NUM_FRAMES)), specs, strict=True)):
        write_video(folder / f"{number:02}.mp4", clip, FPS)
        (folder / f"{number:02}.txt").write_text(plain_caption(spec) + "\n")


def run(*command: str) -> float:
    """Runs an opensora command; returns how long it took, in seconds."""
    print("opensora", *command, flush=True)
    started = time.monotonic()
    subprocess.run([Path(sys.executable).with_name("opensora"), *command], check=True)
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clips", type=int, default=500, help="held-out prompts to judge before and after")
    options = parser.parse_args()
    folder: Path = options.folder
    manifest, run_folder, file = folder / "clips.csv", folder / "run", folder / "results.json"
    adapter = run_folder / "model"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"before": [], "after": []}
    if not manifest.exists():
        write_clips(folder / "clips")
        run("data", "manifest", str(folder / "clips"), "--output", str(manifest))
    if not adapter.exists():
        clips = f"objective.data.manifest={manifest}"
        results["train_s"] = run("train", "toybox_lora", clips, "--output", str(run_folder), "--threads", "1")

    judge, samples = load_judge(), held_out_samples(options.clips)
    specs = sample_specs(100, 0, EASY_WORLD, "held_out")
    real = with_sun(*render(specs))
    table = {"real clips with a sun": {**share_right([label_words(s) for s in specs], judge.read(real))}}
    table["real clips with a sun"]["sun"] = sum(have_sun(real)) / len(specs)
    pipelines = {
        "before": opensora.load_pipeline("toybox"),
        "after": opensora.load_pipeline("toybox", adapters={adapter: 1}),
    }
    for name, pipeline in pipelines.items():
        pipeline.set_progress_bar_config(disable=True)
        known = results[name]
        while len(known) < options.clips:
            video = generate(pipeline, samples[len(known) : len(known) + 20])
            known += [{**read, "sun": sun} for read, sun in zip(judge.read(video), have_sun(video), strict=True)]
            file.write_text(json.dumps(results) + "\n")
        known = known[: options.clips]
        table[name] = share_right([sample.wanted for sample in samples], known)
        table[name]["sun"] = sum(read["sun"] for read in known) / len(known)

    rows = []
    for sample in samples[:5]:
        clips = {name: generate(pipeline, [sample])[0] for name, pipeline in pipelines.items()}
        rows += [(f"{sample.prompt}, {name}", clip) for name, clip in clips.items()]
    PICTURE.parent.mkdir(exist_ok=True)
    contact_sheet(rows, PICTURE, columns=7)
    print("| right, % |", " | ".join(table), "|")
    for attribute in table["after"]:
        print(f"| {attribute} |", " | ".join(f"{100 * of[attribute]:.1f}" for of in table.values()), "|")
    print(f"trained in {results.get('train_s', float('nan')):.0f} s")


if __name__ == "__main__":
    main()
