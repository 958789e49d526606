"""What a recipe says of the training of a diffusion transformer."""

from dataclasses import dataclass, field
from typing import Any, Literal

from opensora.conditioning.masks import check_ratios
from opensora.data.cached import CachedLatents
from opensora.data.clips import ManifestClips
from opensora.data.toybox import ToyboxLatents
from opensora.errors import OpenSoraError
from opensora.models.format import Part
from opensora.training.diffusion.lora import LoRAConfig
from opensora.training.diffusion.noise import IDDPM, Flow
from opensora.training.diffusion.previews import HeldOutLosses, JudgedPrompts, Prompts
from opensora.training.diffusion.text import CachedText, FrozenText, TrainedText
from opensora.training.parts import Untrained


@dataclass(frozen=True)
class DiffusionSettings:
    """Which transformer learns to undo which corruption of which clips.

    Attributes:
        data: where clips or latents come from.
        diffusion: the corruption.
        autoencoder: what makes the latents: a model's name, a folder, or a file.
        text: what encodes captions.
        architecture: class of the transformer, where `transformer` describes it.
        transformer: its keywords; None for those of `init_from`.
        init_from: what to start from: a model's name, a pipeline's folder, or weights of a transformer.
        new_parts: parts of the transformer that may be missing there and are initialised, see `adaptation.start_from`.
        train: "all" of it, what attends along time alone ("temporal"), all the rest ("spatial"), or an adapter beside
            it, which alone is exported then.
        freeze_text_embedder: leave the layers that take in the text as they are.
        sample_posterior: draw latents of clips from the autoencoder's posterior, as all published models were trained;
            otherwise take its mean. The toybox's latents are means.
        frame_masks: strategy -> share of the clips conditioned on frames so, see `conditioning.masks`.
        drop_text: share of captions replaced by the null text, for classifier-free guidance.
        object_weight: extra weight of errors on latent cells that an object touches, where that is known.
        frozen_dtype: precision of networks that are used and not trained.
        preview: what is generated or measured to watch the training.
        export_dtype: precision of the exported weights but for the autoencoder's, which stay as they were used;
            checkpoints are always float32.
        defaults: how the exported pipeline samples, as keywords of `OpenSoraPipeline`.
    """

    data: ToyboxLatents | ManifestClips | CachedLatents
    diffusion: Flow | IDDPM
    autoencoder: str | Untrained
    text: TrainedText | FrozenText | CachedText
    architecture: str = "STDiT3"
    transformer: dict[str, Any] | None = None
    init_from: str | None = None
    new_parts: tuple[Part, ...] = ()
    train: Literal["all", "temporal", "spatial"] | LoRAConfig = "all"
    freeze_text_embedder: bool = False
    sample_posterior: bool = True
    frame_masks: dict[str, float] = field(default_factory=dict)
    drop_text: float = 0.1
    object_weight: float = 0.0
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    preview: JudgedPrompts | Prompts | HeldOutLosses | None = None
    export_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    defaults: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_ratios(self.frame_masks)
        if not 0 <= self.drop_text <= 1:
            raise OpenSoraError(f"objective.drop_text is {self.drop_text}; give a share from 0 to 1")
        if isinstance(self.train, LoRAConfig):
            if self.init_from is None:
                raise OpenSoraError("an adapter is trained beside a model: name it by objective.init_from")
            if isinstance(self.text, TrainedText):
                raise OpenSoraError("an adapter changes the transformer alone; freeze the text encoder: objective.text")
            if self.new_parts:
                raise OpenSoraError("an adapter is trained beside whole weights; leave objective.new_parts out")
