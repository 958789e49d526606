"""`opensora evaluate`: how well a model does what it is told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from opensora.cli.evaluate_compare import EvaluateCompare
from opensora.cli.evaluate_suites import EvaluatePrompts, EvaluateToybox
from opensora.cli.options import FLAG, check_count, check_output, option, refuse_idle
from opensora.cli.progress import Progress
from opensora.cli.tables import print_table
from opensora.errors import OpenSoraError, saying_what_is_kept


@dataclass(frozen=True)
class EvaluateToyboxVae:
    """Let the judge read held-out clips before and after an autoencoder: the gate to training on its latents."""

    autoencoder: Path
    """Folder of the autoencoder."""
    num_clips: int = 500
    """How many held-out clips."""
    seed: int = 0
    """Chooses the clips."""
    num_frames: int = 17
    """Frames of a clip."""
    height: int = 64
    """Height of a clip in pixels."""
    width: int = 64
    """Width of a clip in pixels."""
    device: str | None = None
    """cpu, cuda or mps; an accelerator if there is one when left out."""

    def run(self) -> None:
        import torch

        from opensora.checkpoints.loading import choose_device
        from opensora.checkpoints.source import find_part
        from opensora.evaluation import toybox
        from opensora.evaluation.judge import load_judge

        check_count("--num-clips", self.num_clips)
        if not (self.autoencoder / "config.json").exists():
            raise OpenSoraError(f"no autoencoder in {self.autoencoder}; give the folder that holds its config.json")
        device = choose_device(self.device)
        judge = load_judge(device=device)
        autoencoder = find_part(self.autoencoder, "autoencoder").load()
        torch.nn.Module.to(autoencoder, device)
        size = (self.num_frames, self.height, self.width)
        print_accuracy(toybox.read_gates(judge, autoencoder, size, self.seed, self.num_clips))
        print(f"PSNR: {toybox.reconstruction_psnr(autoencoder, self.num_clips, self.seed, size=size):.1f} dB")


@dataclass(frozen=True)
class EvaluateGivenFrames:
    """Condition a toy model on frames of held-out clips: do they survive, does the rest show what the prompt says?"""

    model: str = "toybox"
    """Name or folder of the model."""
    num_clips: int = 100
    """Held-out clips for each way of conditioning on frames."""
    seed: int = 0
    """Chooses clips and noise."""
    device: str | None = None
    """cpu, cuda or mps; an accelerator if there is one when left out."""

    def run(self) -> None:
        import opensora
        from opensora.checkpoints.loading import choose_device
        from opensora.evaluation.conditioning_frames import survivals
        from opensora.evaluation.judge import load_judge

        check_count("--num-clips", self.num_clips)
        device = choose_device(self.device)
        judge = load_judge(device=device)
        pipeline = opensora.load_pipeline(self.model, device=device)
        pipeline.set_progress_bar_config(disable=True)
        with Progress("generating") as progress:
            found = survivals(pipeline, judge, self.num_clips, self.seed, progress.update)
        rows = [(one.way, one.decibels, *(f"{100 * share:.1f}" for share in one.read.values())) for one in found]
        print_table(("conditioned on", "dB", *(f"{name}, %" for name in found[0].read)), rows, width=120)
        print(f"{self.num_clips} clips each; dB: the worst conditioning frame against what the autoencoder makes of it")


@dataclass(frozen=True)
class EvaluateLoss:
    """The training loss on held-out clips at ten fixed timesteps, size by size.

    Clips of a manifest or of a cache, which the model should not have been trained on; or, without either, clips of the
    toy world in every given size and length, which no bundled model was trained on.
    """

    model: Annotated[str, tyro.conf.Positional] = "toybox"
    """Name or folder of the model."""
    manifest: Path | None = None
    """Table of clips, .csv or .parquet, as opensora data manifest makes it."""
    buckets: Path | None = None
    """JSON file with the sizes of a manifest's clips, such as {"240p": {"1": [1.0, 8], "51": [1.0, 2]}}."""
    frame_interval: Annotated[int | None, option("NUMBER", "the model's")] = None
    """Every how manieth frame of a manifest's videos is taken."""
    scores: Annotated[bool, FLAG] = False
    """End captions in the scores of the manifest, for a model that was trained to know them."""
    cache: Path | None = None
    """Folder that opensora data precompute made with the model's autoencoder."""
    sizes: tuple[str, ...] = ("64x64",)
    """Heights and widths in pixels, as HxW, of toy clips."""
    lengths: tuple[int, ...] = (1, 17, 34)
    """Numbers of frames of toy clips; 1 is an image."""
    num_clips: int = 40
    """Clips of every size and length."""
    seed: int = 0
    """Chooses the noise."""
    batch_size: int = 20
    """Toy clips measured at a time; those of buckets by their batch size."""
    output: Path | None = None
    """JSON file of the results, kept up to date; an existing one is resumed."""
    device: str | None = None
    """cpu, cuda or mps; an accelerator if there is one when left out."""

    def run(self) -> None:
        import opensora
        from opensora.checkpoints.loading import choose_device
        from opensora.contents import read_object
        from opensora.evaluation import held_out, loss

        check_count("--num-clips", self.num_clips)
        check_count("--batch-size", self.batch_size)
        check_output("--output", self.output, ".json")
        if self.manifest is not None or self.cache is not None:
            refuse_idle(self, ("sizes", "lengths", "batch_size"), "it is for toy clips, and there are others")
        if self.manifest is None:
            refuse_idle(self, ("buckets", "frame_interval", "scores"), "it is for the clips of --manifest")
        chosen = held_out.HeldOutClips(
            self.manifest,
            None if self.buckets is None else read_object(self.buckets),
            self.frame_interval,
            self.scores,
            self.cache,
            tuple(held_out.toybox_sizes(self.sizes, self.lengths)),
        )
        pipeline = opensora.load_pipeline(self.model, device=choose_device(self.device))
        clips, portions = held_out.portions_of(pipeline, chosen, self.num_clips, self.batch_size)
        settings = {**loss.describe(pipeline, self.model, self.seed), **clips}
        results = loss.new_results(pipeline, settings)
        if self.output is not None:
            results.resume(self.output)
        with saying_what_is_kept(lambda: _kept_in(self.output)), Progress("measuring") as progress:
            loss.measure(pipeline, portions, results, self.output, self.seed, progress.update)
        head = ("clips", "size", *(f"t={t:.0f}" for t in results.timesteps), "mean")
        table = results.table().items()
        rows = [(str(len(results.losses[label])), label, *(f"{value:.3f}" for value in row)) for label, row in table]
        print_table(head, rows, width=120)
        if results.cut_captions:
            print(f"captions longer than the model reads, and cut: {results.cut_captions}")
        if self.output is not None:
            print(f"results: {self.output}")


Evaluate = (
    Annotated[EvaluateToybox, tyro.conf.subcommand("toybox")]
    | Annotated[EvaluatePrompts, tyro.conf.subcommand("prompts")]
    | Annotated[EvaluateGivenFrames, tyro.conf.subcommand("given-frames")]
    | Annotated[EvaluateToyboxVae, tyro.conf.subcommand("toybox-vae")]
    | Annotated[EvaluateLoss, tyro.conf.subcommand("loss")]
    | Annotated[EvaluateCompare, tyro.conf.subcommand("compare")]
)
"""What `opensora evaluate` can do; every member has `run()`."""


def _kept_in(output: Path | None) -> str:
    """What an evaluation that ended early has found."""
    there = output is not None and output.exists()
    return f"what was found until then is in {output}, and the same command goes on from there" if there else ""


def print_accuracy(columns: dict[str, dict[str, float]]) -> None:
    """Prints shares as percentages: a row per attribute, a column per evaluation."""
    names = next(iter(columns.values()), {})
    rows = [(name, *(f"{100 * column[name]:.1f}" for column in columns.values())) for name in names]
    print_table(("read right, %", *columns), rows)
