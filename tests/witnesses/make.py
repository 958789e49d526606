"""Makes the witnesses anew, by the code that is imported: `python tests/witnesses/make.py --commit COMMIT`.

To be run when behaviour was changed on purpose, and only then: with `--weights` when the weights that come with the
package were, so that all that does not depend on them stays a witness of before. It says what it made in `made.json`.
"""

import argparse
import contextlib
import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent))

from tiny_published import network, tiny
from transformers import ByT5Tokenizer
from witnesses import cases
from witnesses.cases import HERE

from opensora import __version__
from opensora.checkpoints.source import ModelSource
from opensora.cli.main import main as opensora
from opensora.manifest import ClipRow, write_manifest
from opensora.media.read import read_video
from opensora.media.write import write_video
from opensora.pipeline import OpenSoraPipeline

KEPT_OF_RUN = ("recipe.json", "frozen.json", "metrics.jsonl", "cache", "checkpoints")


def run(*arguments: str) -> None:
    print("opensora", shlex.join(arguments)[:150], flush=True)
    if opensora(list(arguments)) != 0:
        raise SystemExit("that did not go well")


def fresh(name: str) -> Path:
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def write_tensors(made: dict[str, torch.Tensor], path: Path) -> None:
    """Writes tensors, and keeps those of other names that are there."""
    before = load_file(path) if path.exists() else {}
    save_file(before | {name: tensor.contiguous() for name, tensor in made.items()}, path)


def make_models() -> dict[str, str]:
    """A pipeline of each family, in miniature; returns their hashes."""
    fresh("models")
    for family, name in (("1.0", "opensora-1.0-16x256x256"), ("1.1", "opensora-1.1-stage3"), ("1.2", "opensora-1.2")):
        model = tiny(name)
        sizes = {"hidden_size": 12, "depth": 1, "num_heads": 1, "mlp_ratio": 1.0, "model_max_length": 120}
        text = {"num_layers": 1, "d_ff": 16, "vocab_size": 384}
        autoencoder = dict(model.autoencoder.config)
        spatial = {"block_out_channels": [4, 4], "down_block_types": ["DownEncoderBlock2D"] * 2}
        autoencoder["spatial"] = {**autoencoder["spatial"], **spatial, "up_block_types": ["UpDecoderBlock2D"] * 2}
        if "temporal" in autoencoder:
            autoencoder["temporal"] = {**autoencoder["temporal"], "channel_multipliers": [1, 1, 1, 1]}
        parts = {
            "transformer": (model.transformer, {**model.transformer.config, **sizes}),
            "autoencoder": (model.autoencoder, autoencoder),
            "text_encoder": (model.text_encoder, {**model.text_encoder.config, **text}),
        }
        networks = {
            part: network(type(published)(**{**vars(published), "config": config}), seed).to(torch.bfloat16)
            for seed, (part, (published, config)) in enumerate(parts.items())
        }
        source = ModelSource.find(name, on_disk=False)
        scheduler = source.parts["scheduler"].load_settings()
        defaults = {**source.defaults, "height": 16, "width": 16, "num_frames": 9, "num_inference_steps": 3}
        pipeline = OpenSoraPipeline(**networks, scheduler=scheduler, tokenizer=ByT5Tokenizer(), **defaults)
        pipeline.save_pretrained(HERE / "models" / family)
    return {name: ModelSource.find(folder).hash() for name, folder in cases.MODELS.items()}


def make_latents(names: Iterable[str]) -> dict[str, str]:
    made = {name: cases.make_latents(cases.LATENTS[name]) for name in names}
    write_tensors(made, HERE / "latents.safetensors")
    return {name: cases.sha256(latents) for name, latents in made.items()}


def make_loops() -> dict[str, str]:
    made = {name: cases.make_loops(*loops) for name, loops in cases.LOOPS.items()}
    write_tensors({name: (video * 255).round().byte() for name, video in made.items()}, HERE / "loops.safetensors")
    return {name: cases.sha256(video) for name, video in made.items()}


def make_footage() -> None:
    """Clips in a table, and a cache of them."""
    footage, rows = fresh("footage"), []
    for name, caption in cases.CAPTIONS.items():
        size = ["--height", "32", "--width", "32", "--num-frames", "17", "--num-sampling-steps", "4"]
        run("generate", caption, *size, "--no-metadata", "--output", name)
        rows.append(ClipRow(Path(name), caption, 17, 32, 32, 8.0))
    write_manifest(Path("clips.csv"), rows)
    run("data", "precompute", "v1_2_debug", *cases.PRECOMPUTE, "--output", "cache", "--device", "cpu", "--workers", "1")
    for name in (*cases.CAPTIONS, "clips.csv"):
        shutil.copy(name, footage / name)
    shutil.copytree("cache", footage / "cache")


def make_runs(names: Iterable[str], work: Path) -> dict[str, Any]:
    """Runs as they lie when they were killed after half of their steps, and what the whole run came to."""
    made = {}
    for name in names:
        recipe, *settings = cases.RUNS[name]
        run("train", recipe, *settings, "--output", name, "--device", "cpu", "--threads", "1")
        weights = load_file(cases.trained_weights(work / name))
        if name in cases.STOPPED_RUNS:
            folder = fresh(f"runs/{name}")
            for file in KEPT_OF_RUN:
                if (work / name / file).is_dir():
                    shutil.copytree(work / name / file, folder / file)
                elif (work / name / file).exists():
                    shutil.copy(work / name / file, folder / file)
            shutil.rmtree(folder / "checkpoints" / "step-00000004", ignore_errors=True)
            save_file(weights, HERE / "runs" / f"{name}.safetensors")
        losses = [json.loads(line)["loss"] for line in (work / name / "metrics.jsonl").read_text().splitlines()]
        made[name] = {"losses": losses, "weights": cases.sha256_of_all(weights)}
    return made


def make_clips(names: Iterable[str]) -> dict[str, str]:
    """Clips of the command line, each with its record inside and beside it."""
    folder = HERE / "clips"
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    shutil.copytree("adapter/model", folder / "adapter")
    shutil.move("adapter", "run_of_adapter")
    shutil.copytree(folder / "adapter", "adapter")
    given = fresh("clips/given")
    write_video(given / "picture.png", cases.picture(40, 48), 1)
    run("generate", *cases.CLIPS["plain.mp4"], "--no-metadata", "--output", str(given / "plain.mp4"))
    shutil.copytree(given, "given")
    hashes = {}
    for name in names:
        run("generate", *cases.CLIPS[name], "--device", "cpu", "--output", str(folder / name))
        hashes[name] = cases.sha256(torch.from_numpy(read_video(folder / name)[0]))
    return hashes


def make_losses(names: Iterable[str]) -> None:
    for name in names:
        (HERE / "losses" / name).unlink(missing_ok=True)  # a whole evaluation is not made again
        run("evaluate", "loss", cases.LOSSES_OF[name], *cases.LOSSES, "--output", str(HERE / "losses" / name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", required=True, help="of the code that is imported")
    parser.add_argument("--weights", action="store_true", help="only what the weights of the package decide")
    args = parser.parse_args()
    made: dict[str, Any] = {"models": {}, "latents": {}, "loops": {}, "runs": {}, "clips": {}}
    if args.weights:
        made = json.loads((HERE / "made.json").read_text())
    with tempfile.TemporaryDirectory() as work, contextlib.chdir(work), cases.one_thread():
        made |= {"opensora": __version__, "commit": args.commit, "arithmetic_of_weights": cases.arithmetic()}
        if not args.weights:
            made["arithmetic"] = cases.arithmetic()
            made["models"] = make_models()
        shutil.copytree(HERE / "models", "models")
        made["latents"] |= make_latents(cases.OF_WEIGHTS["latents"] if args.weights else cases.LATENTS)
        made["loops"] |= make_loops()
        if not args.weights:
            make_footage()
        shutil.copytree(HERE / "footage", work, dirs_exist_ok=True)
        made["runs"] |= make_runs(cases.OF_WEIGHTS["runs"] if args.weights else cases.RUNS, Path(work))
        made["clips"] |= make_clips(cases.OF_WEIGHTS["clips"] if args.weights else cases.CLIPS)
        make_losses(cases.OF_WEIGHTS["losses"] if args.weights else cases.LOSSES_OF)
    (HERE / "made.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
