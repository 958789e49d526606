"""Teaches the toybox's text encoder what captions say, before any clip is drawn by them: half a minute of one CPU core.

A transformer that is trained along with a fresh text encoder learns the meaning of frequent words and mixes up rare
ones of the same kind: to the first toybox "rises" and "falls" were the same, and so were "grows" and "shrinks". Here
every wording, English or Chinese, is told apart from its opposites by the clip's labels, and joined with its synonyms.
"""

import copy
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.checkpoints.loading import load_pipeline
from opensora.distributed.seeding import BatchKey
from opensora.pipeline import OpenSoraPipeline
from opensora.recipes.toybox_vae import RUNS
from opensora.toybox.captions import Language, build_tokenizer, caption
from opensora.toybox.specs import ATTRIBUTES, EASY_WORLD, World, sample_specs
from opensora.training.config import LoopConfig, Recipe
from opensora.training.diffusion.text import TrainedText, build_trained_encoder
from opensora.training.muon import hidden_matrices
from opensora.training.optimizer import OptimizerConfig
from opensora.training.parts import Origin
from opensora.training.task import TrainingSetup, TrainingTask


@dataclass(frozen=True)
class WordingBatch:
    """Tokens (B, L) of captions, the mask (B, L) of those that are none of the padding, and labels (B,).

    `is_english` is (B,) bool.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: dict[str, Tensor]
    is_english: Tensor


class WordingTask(TrainingTask):
    """Cross-entropy of a clip's attributes, read off the mean state of its caption's tokens."""

    def __init__(self, config: "WordingTaskConfig", device: str) -> None:
        self.config, self.device = config, device
        self.tokenizer = build_tokenizer()
        self.encoder = build_trained_encoder(TrainedText(config.encoder), config.init_from, len(self.tokenizer), device)
        self.module = nn.ModuleDict({"text_encoder": self.encoder})
        self.reader: OpenSoraPipeline | None = None
        width = self.encoder.config.d_model
        if config.reader is not None:
            self.reader = load_pipeline(config.reader)
            self.reader.text_encoder.requires_grad_(False)
            self.y_embedder = copy.deepcopy(self.reader.transformer.y_embedder).float()
            self.module["y_embedder"] = self.y_embedder
            self.reader_knows_chinese = self.reader.text_encoder.config.vocab_size == len(self.tokenizer)
            if config.from_projection:
                width = self.reader.transformer.config.hidden_size
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(labels)) for name, labels in ATTRIBUTES.items()})
        self.module["heads"] = self.heads
        self.module.to(device)

    def prepare(self, key: BatchKey) -> WordingBatch:
        generator = key.generator("captions")
        seed = int(torch.randint(2**62, (), generator=generator))
        specs, rng = sample_specs(self.config.batch_size, seed, self.config.world), random.Random(seed)
        languages: list[Language] = [rng.choice(("en", "zh")) for _ in specs]
        captions = [
            caption(spec, rng, language, self.config.plain) for spec, language in zip(specs, languages, strict=True)
        ]
        tokens = self.tokenizer(captions, padding="longest", return_tensors="pt")
        rows = [spec.labels() for spec in specs]
        labels = {name: torch.tensor([row[name] for row in rows]).to(self.device) for name in ATTRIBUTES}
        is_english = torch.tensor([language == "en" for language in languages]).to(self.device)
        return WordingBatch(tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device), labels, is_english)

    def loss(self, batch: WordingBatch, key: BatchKey) -> dict[str, Tensor]:
        states = self.encoder(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        words, losses = batch.attention_mask[:, :, None], {}
        if self.reader is not None:
            read, before = self.y_embedder(states), self.read_before(self.reader, batch)
            scale = before.square().mean().sqrt()
            known = words if self.reader_knows_chinese else words * batch.is_english[:, None, None]
            losses["reading"] = self.config.reading_weight * (((read - before) / scale).square() * known).mean((1, 2))
            if self.config.from_projection:
                states = read / scale
        mean = (states * words).sum(dim=1) / words.sum(dim=1)
        for name, labels in batch.labels.items():
            head: Any = self.heads[name]
            weight = head.weight
            if self.config.from_projection:  # else a large weight would do where a large difference is wanted
                weight = F.normalize(weight, dim=1)
            losses[name] = F.cross_entropy(F.linear(mean, weight, head.bias), labels, reduction="none")
        losses["motion"] = self.config.motion_weight * losses["motion"]
        return losses

    @torch.no_grad()
    def read_before(self, reader: OpenSoraPipeline, batch: WordingBatch) -> Tensor:
        """What a transformer read in these captions with its own text encoder, (B, L, D)."""
        known = batch.input_ids.clamp(max=reader.text_encoder.config.vocab_size - 1)  # the first one knew no Chinese
        states = reader.text_encoder(known, attention_mask=batch.attention_mask).last_hidden_state
        return reader.transformer.y_embedder(states)

    def export(self, module: Any, folder: Path) -> None:
        """Writes the encoder, and its tokenizer beside it; or the whole model of the reader with the new ones."""
        if self.reader is not None:
            self.reader.transformer.y_embedder.load_state_dict(module["y_embedder"].state_dict())
            self.reader.register_modules(text_encoder=module["text_encoder"], tokenizer=self.tokenizer)
            self.reader.save_pretrained(folder)
            return
        module["text_encoder"].save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class WordingTaskConfig:
    """What reads captions, and of what.

    Attributes:
        encoder: keywords of the encoder's configuration, from scratch; None to start from `init_from`.
        init_from: a model's name or folder to start from.
        reader: a model whose transformer is to read English captions as it read them with its own text encoder; what
            projects the text is trained for it, and the whole model exported.
        from_projection: read the attributes off what the reader makes of the text, on the scale of what it made before.
        motion_weight: of the motion's cross-entropy; of the others it is 1.
        reading_weight: of the squared difference between what is read and what was read before.
        world: where clips come from.
        plain: share of plain wordings. With every wording alike, each is rare, and that "grows" and "shrinks" are
            opposites is learnt last of all.
        batch_size: captions a step, half of them in Chinese.
    """

    encoder: dict[str, Any] | None = None
    init_from: Origin | None = None
    reader: str | None = None
    from_projection: bool = False
    motion_weight: float = 1.0
    reading_weight: float = 2.0
    world: World = EASY_WORLD
    plain: float = 0.25
    batch_size: int = 96

    def build(self, device: str) -> TrainingSetup:
        task = WordingTask(self, device)
        names = {name for name, _ in task.module.named_parameters()}
        return TrainingSetup(task, not_matrices=names - hidden_matrices(task.module))


def toybox_text() -> Recipe:
    """The text encoder of the first toybox, taught to tell opposites apart, and Chinese."""
    return Recipe(
        name="toybox_text",
        objective=WordingTaskConfig(init_from=str(RUNS / "toybox_given" / "model")),
        loop=LoopConfig(
            steps=1500,
            precision="fp32",
            ema_decay=0.98,
            optimizer=OptimizerConfig(lr=3e-3, weight_decay=0.02, decay=0.5),
        ),
    )


def toybox_text_read() -> Recipe:
    """The same encoder, and the first toybox's transformer made to read it as it read its own."""
    return _read_by("toybox_text", "toybox_given", "toybox_text_read", steps=500, reading_weight=1.0)


def toybox_text_loud() -> Recipe:
    """`toybox_bilingual` made to read what captions say loudly: its projection had made opposites nearly the same."""
    return _read_by("toybox_bilingual", "toybox_bilingual", "toybox_text_loud", 400, from_projection=True)


def toybox_text_louder() -> Recipe:
    """`toybox_directions` made to read motions still more loudly."""
    before = "toybox_directions"
    options = {"from_projection": True, "motion_weight": 10.0, "reading_weight": 1.0}
    return _read_by(before, before, "toybox_text_louder", 300, **options)


def toybox_text_settled() -> Recipe:
    """`toybox_growth` made to read again what training on motions has let it forget: places, colours, sizes."""
    before = "toybox_growth"
    return _read_by(before, before, "toybox_text_settled", 250, from_projection=True, motion_weight=2.0)


def _read_by(encoder: str, reader: str, name: str, steps: int, **options: Any) -> Recipe:
    objective = WordingTaskConfig(
        init_from=str(RUNS / encoder / "model"), reader=str(RUNS / reader / "model"), **options
    )
    optimizer = OptimizerConfig(muon_lr=0.005, lr=3e-3, decay=0.8)
    return Recipe(name, objective, LoopConfig(steps=steps, precision="fp32", ema_decay=0.98, optimizer=optimizer))
