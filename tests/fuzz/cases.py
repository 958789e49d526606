"""The cases of the fuzz test: case K of seed S is always the same command line on the same inputs."""

import contextlib
import io
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from fuzz.bases import DATA, PROMPT, PUBLISHED, TRAIN
from fuzz.mutations import (
    hostile_text,
    make_special,
    mutate_bytes,
    mutate_json,
    mutate_safetensors,
    mutate_text,
)

from opensora.cli.main import main
from opensora.overrides import assignments
from opensora.recipes import RECIPES, v1_2_debug

GENERATE = ["generate", PROMPT, "--model", "tiny", "--device", "cpu", "--output", "out/clip.mp4"]
KEY = ["--refine-key-file", "key.txt"]
RUN = [*TRAIN, "loop.steps=3"]
EVALUATED = ["evaluate", "prompts", "prompts.txt", "--model", "tiny", "--metrics", "colour", "--device", "cpu"]
LOSS = ["evaluate", "loss", "tiny", "--sizes", "64x64", "--lengths", "1", "--num-clips", "1", "--batch-size", "1"]
LOSS += ["--device", "cpu", "--output", "loss.json"]
LATENTS = ["--model", "codec", "--num-clips", "2", "--num-frames", "4", "--height", "32", "--width", "32"]
LATENTS += ["--device", "cpu"]
COMPARE = ["compare", "--model", "tiny", "--suite", "prompts.txt", "--prompts", "1", "--metrics", "colour"]
COMPARE += ["--device", "cpu", "--output", "compared"]
CACHE_RUN = [*TRAIN[:5], "other", "loop.steps=1", 'objective.data={"type": "CachedLatents", "folder": "cache"}']

# Command lines that work, one for every way in which a format is read.
COMMANDS: dict[str, list[str]] = {
    "generate": GENERATE,
    "generate image": [*GENERATE, "--image", "photo.jpg"],
    "generate scales": [*GENERATE, "--channel-scales", "0-2:7,3:1"],
    "generate latent space": [*GENERATE, "--latent-space", '{"scaling_factor": 0.5, "scale": null}'],
    "generate fitted": [*GENERATE, "--max-memory", "2GB"],
    "generate equivalent": [*GENERATE, "--cfg-channels", "3", "--equivalent-to", "all"],
    "generate png": [*GENERATE[:-1], "out/clip.gif", "--last-image", "photo.png"],
    "generate extend": [*GENERATE, "--extend", "movie.mp4", "--condition-frame-length", "1"],
    "generate edit": [*GENERATE, "--edit", "movie.gif", "--strength", "0.5"],
    "generate webp": [*GENERATE, "--edit", "movie.webp", "--strength", "0.5"],
    "generate webm": [*GENERATE, "--edit", "movie.webm", "--strength", "0.5"],
    "generate mov": [*GENERATE, "--extend", "movie.mov", "--condition-frame-length", "1"],
    "generate mkv": [*GENERATE, "--edit", "movie.mkv", "--strength", "0.5"],
    "generate heic": [*GENERATE, "--image", "photo.heic"],
    "generate pictures": [*GENERATE, "--image", "two.heic"],
    "generate tiff": [*GENERATE, "--image", "two.tiff"],
    "generate run": [*GENERATE[:2], "--model", "run@2", *GENERATE[4:]],
    "generate peft": [*GENERATE, "--adapter", "look_peft"],
    "generate kohya": [*GENERATE, "--adapter", "look_kohya.safetensors"],
    "generate references": [*GENERATE, "--reference-path", "photo.png;movie.mp4", "--mask-strategy", "0;0,1,0,-1,1"],
    "generate adapter": [*GENERATE, "--adapter", "look:0.5"],
    "generate part": [*GENERATE, "--transformer", "lone"],
    "generate file": [*GENERATE, "--transformer", "lone/diffusion_pytorch_model.safetensors"],
    "generate zipped": [*GENERATE, "--transformer", "zipped/weights.pt"],
    "generate old": [*GENERATE, "--transformer", "old/weights.bin"],
    "generate prompts": ["generate", "--prompt-path", "prompts.txt", *GENERATE[2:-1], "out"],
    "generate key": [*GENERATE, "--refine-endpoint", "http://127.0.0.1:9/v1", "--refine-model", "x", *KEY],
    **{
        f"again {name}": ["generate", "--from", name, "--model", "tiny", "--device", "cpu", "--output", "out/again.mp4"]
        for name in ("clip.mp4", "clip.mp4.json", "clip.png", "clip.gif", "clip.webp")
    },
    "again used": [
        "generate",
        "--from",
        "used.mp4.json",
        *GENERATE[2:-1],
        "out/u.mp4",
        "--adapter",
        "look",
        "--image",
        "photo.png",
    ],
    **{f"generate {folder}": [*GENERATE[:3], folder, *GENERATE[4:], "--image", "photo.png"] for folder in PUBLISHED},
    **{f"inspect {folder}": ["inspect", folder] for folder in PUBLISHED},
    **{f"plan {folder}": ["plan", "--model", folder, "--device", "cpu"] for folder in ("joint", "deep")},
    **{f"convert {folder}": ["convert", folder, "out/model"] for folder in PUBLISHED},
    "models": ["models"],
    "inspect": ["inspect", "tiny"],
    "inspect quick": ["inspect", "tiny", "--quick", "--json"],
    "inspect file": ["inspect", "lone/diffusion_pytorch_model.safetensors"],
    "inspect zipped": ["inspect", "zipped/weights.pt"],
    "inspect old": ["inspect", "old"],
    "inspect adapter": ["inspect", "look"],
    "inspect kohya": ["inspect", "look_kohya.safetensors"],
    "inspect run": ["inspect", "run/model"],
    "inspect checkpoint": ["inspect", "run@1"],
    "convert peft": ["convert", "--adapter", "look_peft", "out/look.safetensors", "--to", "kohya"],
    "convert run": ["convert", "run@2", "out/model"],
    "convert": ["convert", "tiny", "out/model", "--dtype", "float16"],
    "convert zipped": ["convert", "zipped/weights.pt", "out/model", "--model", "opensora-1.2"],
    "convert lone": ["convert", "lone", "out/model", "--max-shard-size", "100KB"],
    "plan": ["plan", "--model", "tiny", "--device", "cpu"],
    "plan serving": ["plan", "serving", "--times", "times.txt", "--clips-per-day", "9000", "--workers", "3"],
    "push": ["push", "tiny", "someone/tiny", "--dry-run"],
    "manifest": ["data", "manifest", "clips", "--output", "out/m.csv"],
    "manifest captions": ["data", "manifest", "clips", "--output", "out/m.csv", "--captions", "captions.csv"],
    "manifest notes": ["data", "manifest", "clips", "--output", "out/m.csv", "--captions", "metadata.jsonl"],
    "data plan": ["data", "plan", "clips.csv", "--buckets", "buckets.json"],
    "data plan parquet": ["data", "plan", "clips.parquet", "--buckets", "buckets.json"],
    "precompute": ["data", "precompute", "v1_2_debug", DATA, "--output", "cache", "--device", "cpu"],
    "train": RUN,
    "train settings": ["train", "v1_2_debug", "--settings"],
    "train dry": ["train", "v1_2_debug", "--device", "cpu", "--dry-run"],
    "train cache": CACHE_RUN,
    "evaluate loss": LOSS,
    "evaluate cache": ["evaluate", "loss", "run/model", "--cache", "cache", "--device", "cpu"],
    "evaluate frames": ["evaluate", "given-frames", "--model", "tiny", "--num-clips", "1", "--device", "cpu"],
    "latents audit": ["latents", "audit", *LATENTS, "--output", "out/found.json"],
    "latents clips": ["latents", "audit", *LATENTS, "--data", "clips.csv"],
    "latents measure": ["latents", "measure", *LATENTS, "--output", "out/codec"],
    "latents in place": ["latents", "measure", *LATENTS, "--in-place"],
    "compare": COMPARE,
    "compare clips": ["compare", "--clips", "clips", "--metrics", "colour", "--output", "out/compared"],
    "evaluate toybox": ["evaluate", "toybox", "--model", "tiny", "--num-prompts", "1", "--device", "cpu"],
    "evaluate prompts": [*EVALUATED, "--output", "evaluated"],
    "evaluate compare": ["evaluate", "compare", "evaluated", "evaluated/results.json", "--bound", "right_all=0.1"],
}
OPTIONS = [
    "generate",
    "plan",
    "inspect",
    "convert",
    "manifest",
    "data plan",
    "precompute",
    "train dry",
    "evaluate loss",
]
OPTIONS += ["generate", "generate image", "generate references", "evaluate toybox", "evaluate frames"]
OPTIONS += [
    "generate fitted",
    "train settings",
    "generate scales",
    "generate equivalent",
    "latents audit",
    "latents measure",
]
OPTIONS += ["plan serving", "compare", "compare clips", "evaluate prompts", "evaluate compare"]

# Which inputs each of them reads; a folder stands for all files in it.
INPUTS: dict[str, list[str]] = {
    "generate": ["tiny"],
    "generate image": ["photo.jpg"],
    "generate png": ["photo.png"],
    "generate extend": ["movie.mp4"],
    "generate edit": ["movie.gif"],
    "generate webp": ["movie.webp"],
    "generate webm": ["movie.webm"],
    "generate mov": ["movie.mov"],
    "generate mkv": ["movie.mkv"],
    "generate heic": ["photo.heic"],
    "generate pictures": ["two.heic"],
    "generate tiff": ["two.tiff"],
    "generate run": ["run/checkpoints", "run/recipe.json", "run/frozen.json"],
    "generate peft": ["look_peft"],
    "generate kohya": ["look_kohya.safetensors"],
    "generate references": ["photo.png", "movie.mp4"],
    "generate adapter": ["look"],
    "generate part": ["lone"],
    "generate file": ["lone"],
    "generate zipped": ["zipped"],
    "generate old": ["old"],
    "generate prompts": ["prompts.txt"],
    "generate key": ["key.txt"],
    **{f"again {name}": [name] for name in ("clip.mp4", "clip.mp4.json", "clip.png", "clip.gif", "clip.webp")},
    "again used": ["used.mp4.json", "look"],
    **{f"{command} {folder}": [folder] for command in ("generate", "inspect", "convert") for folder in PUBLISHED},
    **{f"plan {folder}": [folder] for folder in ("joint", "deep")},
    "inspect": ["tiny"],
    "inspect quick": ["tiny"],
    "inspect file": ["lone"],
    "inspect zipped": ["zipped"],
    "inspect old": ["old"],
    "inspect adapter": ["look"],
    "inspect kohya": ["look_kohya.safetensors"],
    "inspect run": ["run/model"],
    "inspect checkpoint": ["run/checkpoints"],
    "convert peft": ["look_peft"],
    "convert run": ["run/checkpoints", "run/recipe.json"],
    "convert": ["tiny"],
    "convert zipped": ["zipped"],
    "convert lone": ["lone"],
    "plan": ["tiny"],
    "plan serving": ["times.txt"],
    "push": ["tiny"],
    "manifest": ["clips"],
    "manifest captions": ["captions.csv"],
    "manifest notes": ["metadata.jsonl"],
    "data plan": ["clips.csv", "buckets.json"],
    "data plan parquet": ["clips.parquet"],
    "precompute": ["clips.csv", "clips", "cache"],
    "train": ["run/recipe.json", "run/frozen.json", "run/metrics.jsonl", "run/checkpoints"],
    "train cache": ["cache"],
    "latents audit": ["codec"],
    "latents clips": ["clips.csv", "clips"],
    "latents in place": ["codec"],
    "evaluate loss": ["loss.json", "tiny"],
    "evaluate cache": ["cache", "run/model"],
    "evaluate prompts": ["evaluated", "prompts.txt"],
    "evaluate compare": ["evaluated/results.json"],
    "compare": ["compared", "prompts.txt"],
    "compare clips": ["clips"],
}
LARGE = 20_000  # bytes; what is changed at random in larger files is mostly a weight


@dataclass
class Case:
    """One command line.

    Attributes:
        number: of the case.
        args: after `opensora`.
        inputs: what is wrong, in words, and what makes it so.
        said: what was done, for people.
    """

    number: int
    args: list[str]
    said: str
    inputs: list[Callable[[Path], None]] = field(default_factory=list)

    def prepare(self, base: Path, folder: Path) -> None:
        """Lays the inputs out in an empty folder."""
        text = "\n".join(self.args)
        for path in base.iterdir():
            if re.search(rf"\b{re.escape(path.name)}\b", text) or (path.name == "clips" and "clips" in text):
                copy = shutil.copytree if path.is_dir() else shutil.copyfile
                copy(path, folder / path.name)
        for change in self.inputs:
            change(folder)


def make_case(number: int, seed: int, base: Path) -> Case:
    """Case `number` of a campaign."""
    rng = random.Random(f"{seed}/{number}")
    kinds = ((_options, 40), (_file, 42), (_special, 6), (_setting, 12))
    make = rng.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])[0]
    return make(number, rng, base)


def _options(number: int, rng: random.Random, base: Path) -> Case:
    """Options that are wrong, missing, twice, or given to something else."""
    name = rng.choice(OPTIONS)
    args = list(COMMANDS[name])
    depth = 2 if args[0] in ("data", "evaluate", "latents") or args[:2] == ["plan", "serving"] else 1
    flags = _flags(" ".join(args[:depth]))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        how, files = rng.random(), sorted(path.name for path in base.iterdir())
        value = rng.choice(files) if rng.random() < 0.2 else hostile_text(rng)
        if how < 0.7 and flags:
            args += [rng.choice(flags), value] if rng.random() < 0.9 else [f"{rng.choice(flags)}={value}"]
        elif how < 0.85 and len(args) > depth:
            args[rng.randrange(depth, len(args))] = value
        elif how < 0.92 and len(args) > depth:
            del args[rng.randrange(depth, len(args))]
        else:
            args.insert(rng.randrange(depth, len(args) + 1), value)
    return Case(number, args, "options")


@cache
def _flags(command: str) -> list[str]:
    """The options of a command, off its help page."""
    page = io.StringIO()
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    lines = [line for line in page.getvalue().splitlines() if re.match(r"\W*-", line)]
    return sorted({flag for line in lines for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", line)})


def _file(number: int, rng: random.Random, base: Path) -> Case:
    """A file that is not as it was written."""
    name, path = _input(rng, base)
    content = (base / path).read_bytes()
    suffix, how = path.suffix, rng.random()
    if suffix in (".json", ".jsonl") and how < 0.85:
        new = mutate_json(content.decode(), rng).encode("utf-8", "surrogatepass")
    elif suffix in (".csv", ".txt") and how < 0.8:
        new = mutate_text(content.decode(), rng).encode("utf-8", "surrogatepass")
    elif suffix == ".safetensors" and how < 0.6:
        new = mutate_safetensors(content, rng)
    else:
        new = mutate_bytes(content, rng)
    return Case(number, list(COMMANDS[name]), f"{path} changed", [lambda folder: _write(folder / path, new)])


def _special(number: int, rng: random.Random, base: Path) -> Case:
    """Something else where a file is expected, or nothing."""
    name, path = _input(rng, base)

    def replace(folder: Path) -> None:
        (folder / path).unlink()
        if rng.random() < 0.85:
            make_special(folder / path, rng)

    return Case(number, list(COMMANDS[name]), f"{path} replaced by what is no file", [replace])


def _setting(number: int, rng: random.Random, base: Path) -> Case:
    """A recipe's setting of another value."""
    recipe = rng.choice(RECIPES)()
    is_small = recipe.name.endswith("_debug")  # others are traced for longer than what is wrong with them takes
    args = ["train", recipe.name, "--device", "cpu", "--dry-run" if is_small else "--settings"]
    if rng.random() < 0.3:
        recipe, args = v1_2_debug(), list(COMMANDS["train"])
    for _ in range(rng.choice((1, 1, 2))):
        key, _, value = rng.choice(assignments(recipe)).partition("=")
        new = mutate_json(value, rng) if value[:1] in "{[" and rng.random() < 0.7 else hostile_text(rng)
        args.append(f"{key}={new}")
    return Case(number, [arg.replace("\0", "") for arg in args], "settings")


def _input(rng: random.Random, base: Path) -> tuple[str, Path]:
    """A command that reads files, and one of them."""
    name = rng.choice(sorted(INPUTS))
    root = base / rng.choice(INPUTS[name])
    files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    small = [path for path in files if path.stat().st_size < LARGE] or files
    return name, rng.choice(small if rng.random() < 0.7 else files).relative_to(base)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
