"""What cases of the fuzz test are made from: one good specimen of every format that the tool reads, all of them tiny.

`build` makes them once for a campaign, with the tool itself where it writes the format.
"""

import contextlib
import io
import json
import os
from pathlib import Path

import numpy as np
import pillow_heif
import torch
from PIL import Image
from published_pipelines import pipeline_of
from safetensors.torch import save_file
from tiny_pipeline import make_autoencoder, make_pipeline

from opensora.cli.main import main
from opensora.media.write import write_video
from opensora.training.diffusion.lora import LoRAConfig, add_adapter, export_adapter

PROMPT = "a small red ball rolls left"
PUBLISHED = {"windows": "opensora-1.3", "joint": "opensora-2.0", "deep": "opensora-2.0-dc-ae"}
"""Folder -> the published model that it holds in miniature."""
BUCKETS = {"64x64": {"9": [1.0, 2], "1": [0.5, 2]}}
DATA = 'objective.data={"type": "ManifestClips", "buckets": {"64x64": {"9": [1.0, 2]}}, "manifest": "clips.csv"}'
TRAIN = ["train", "v1_2_debug", "--device", "cpu", "--output", "run", "loop.checkpoint_every=1", "loop.log_every=1"]
TRAIN += ["objective.data.num_clips_of_other_lengths=2", "objective.data.num_clips=4", "objective.data.batch_size=1"]


def build(folder: Path) -> None:
    """Makes all specimens in `folder`, which becomes the working directory."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    _models()
    _media()
    _texts()
    generate = ["generate", PROMPT, "--model", "tiny", "--device", "cpu", "--output"]
    _run(*generate, "clip.mp4")
    for ending in ("png", "gif", "webp"):
        _run(*generate, f"clip.{ending}")
    _run(
        *generate,
        "used.mp4",
        "--adapter",
        "look:0.5",
        "--image",
        "photo.png",
        "--loop",
        "2",
        "--condition-frame-length",
        "1",
        "--channel-scales",
        "0-2:7,3:1",
        "--latent-space",
        '{"shift": [0.5, 0.0, 0.0, 0.0], "scale": null}',
    )
    _run("data", "manifest", "clips", "--output", "clips.csv")
    _run("data", "manifest", "clips", "--output", "clips.parquet")
    _run("data", "precompute", "v1_2_debug", DATA, "--output", "cache", "--device", "cpu")
    _run(*TRAIN, "loop.steps=2")
    loss = ["--sizes", "64x64", "--lengths", "1", "--num-clips", "1", "--batch-size", "1", "--device", "cpu"]
    _run("evaluate", "loss", "tiny", *loss, "--output", "loss.json")
    compared = ["--prompts", "1", "--metrics", "colour", "--device", "cpu", "--output", "compared"]
    measured = ["--model", "tiny", "--metrics", "colour", "--device", "cpu", "--output", "evaluated"]
    _run("evaluate", "prompts", "prompts.txt", *measured)
    _run("compare", "--model", "tiny", "--suite", "prompts.txt", *compared)


def _run(*args: str) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(args)
    if code:
        raise RuntimeError(f"opensora {' '.join(args)} ended with {code}: {said.getvalue()[-1000:]}")


def _models() -> None:
    pipeline = make_pipeline()
    pipeline.save_pretrained("tiny")
    make_autoencoder().save_pretrained("codec")
    for folder, name in PUBLISHED.items():
        pipeline_of(name).save_pretrained(folder)
    weights = {name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()}
    for part in ("lone", "zipped", "old"):
        Path(part).mkdir()
        (Path(part) / "config.json").write_text(Path("tiny/transformer/config.json").read_text())
    save_file(weights, "lone/diffusion_pytorch_model.safetensors")
    torch.save({"ema": weights}, "zipped/weights.pt")
    torch.save({"state_dict": weights}, "old/weights.bin", _use_new_zipfile_serialization=False)
    transformer, config = make_pipeline().transformer, LoRAConfig(rank=2)
    add_adapter(transformer, config)
    export_adapter(transformer, config, Path("look"), base="tiny", training={})
    for layout, name in (("peft", "look_peft"), ("kohya", "look_kohya.safetensors")):
        _run("convert", "--adapter", "look", name, "--to", layout)


def _media() -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    Path("clips").mkdir()
    for number in range(3):
        write_video(f"clips/{number}.mp4", np.roll(frames, number, axis=0), fps=8)
        Path(f"clips/{number}.txt").write_text(f"clip number {number}\n")
    Image.fromarray(frames[0]).save("clips/still.jpg")
    Path("clips/still.txt").write_text("a picture")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(frames[0]).save("photo.jpg", exif=exif)
    Image.fromarray(frames[0]).save("photo.png")
    write_video("movie.mp4", frames[:9], fps=8)
    write_video("movie.gif", frames[:5], fps=8)
    for ending in ("webp", "webm", "mov", "mkv"):
        write_video(f"movie.{ending}", frames[:5], fps=8)
    photo = pillow_heif.from_pillow(Image.fromarray(frames[0]))
    photo.save("photo.heic", quality=90)
    photo.add_from_pillow(Image.fromarray(frames[1]))
    photo.save("two.heic", quality=90)
    Image.fromarray(frames[0]).save("two.tiff", save_all=True, append_images=[Image.fromarray(frames[1])])


def _texts() -> None:
    Path("prompts.txt").write_text(f"{PROMPT}\na large blue square rolls right\n")
    Path("key.txt").write_text("secret\n")
    Path("times.txt").write_text("1.5\n0.25\n3\n")
    Path("buckets.json").write_text(json.dumps(BUCKETS))
    captions = {"0.mp4": "a clip", "1.mp4": "another", "still.jpg": "a picture"}
    rows = [{"file_name": name, "text": text} for name, text in captions.items()]
    Path("captions.csv").write_text("path,text\n" + "".join(f"{name},{text}\n" for name, text in captions.items()))
    Path("metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
