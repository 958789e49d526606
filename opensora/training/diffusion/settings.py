"""What a recipe says of the training of a diffusion transformer."""

import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from opensora.conditioning.known_frames import Drop, check_drops, check_weights, takes_pixels
from opensora.conditioning.masks import check_ratios
from opensora.data.cached import CachedLatents
from opensora.data.clips import ManifestClips
from opensora.data.degradation import Degradation
from opensora.data.toybox import ToyboxLatents
from opensora.errors import OpenSoraError
from opensora.models.format import Part
from opensora.pipeline import OpenSoraPipeline
from opensora.settings import build_value, nearest_name
from opensora.training.diffusion.few_steps import FewSteps
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
        teacher: a model of rectified flow whose answers to the same noisy latents are learnt in place of the clips, see
            `training.diffusion.teacher`; None for the clips.
        few_steps: the guided path of `teacher` is learnt in few steps, see `training.diffusion.few_steps`; None for its
            answers.
        train: "all" of it, what attends along time alone ("temporal"), all the rest ("spatial"), or an adapter beside
            it, which alone is exported then.
        freeze_text_embedder: leave the layers that take in the text as they are.
        sample_posterior: draw latents of clips from the autoencoder's posterior, as all published models were trained;
            otherwise take its mean. The toybox's latents are means.
        frame_masks: strategy -> share of the clips conditioned on frames so, see `conditioning.masks`.
        known_frames: kind -> weight of clips of which frames are shown beside the noise, to networks that read them,
            see `conditioning.known_frames`. They are cut out of the clip's latents (1.3), or encoded by themselves and
            hold nothing of the frames beside them (2.0), which takes clips, not latents: the transformer's
            `known_frames_alone` says so, to training and to sampling.
        degradation: clips are made worse before they are encoded and noised, and the way to the good ones is learnt,
            see `data.degradation`; that takes clips, not latents, and rectified flow. None leaves them as they are.
        drop_text: share of captions replaced by the null text, for classifier-free guidance.
        drop_pooled: share of pooled vectors of text that are replaced by that of no text, by themselves, so that either
            text may be missing alone (Open-Sora 2.0); None for those whose captions `drop_text` replaces.
        drop_of_known: what is dropped ("text", "frames" or "both") -> share of the clips with known frames, in place of
            `drop_text`.
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
    teacher: str | None = None
    few_steps: FewSteps | None = None
    train: Literal["all", "temporal", "spatial"] | LoRAConfig = "all"
    freeze_text_embedder: bool = False
    sample_posterior: bool = True
    frame_masks: dict[str, float] = field(default_factory=dict)
    known_frames: dict[str, float] = field(default_factory=dict)
    degradation: Degradation | None = None
    drop_text: float = 0.1
    drop_pooled: float | None = None
    drop_of_known: dict[Drop, float] = field(default_factory=dict)
    object_weight: float = 0.0
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    preview: JudgedPrompts | Prompts | HeldOutLosses | None = None
    export_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    defaults: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_ratios(self.frame_masks)
        check_weights(self.known_frames)
        check_drops(self.drop_of_known)
        check_pipeline_defaults(self.defaults)
        for name, share in (("drop_text", self.drop_text), ("drop_pooled", self.drop_pooled)):
            if share is not None and not 0 <= share <= 1:
                raise OpenSoraError(f"objective.{name} is {share}; give a share from 0 to 1")
        if self.takes_pixels and not isinstance(self.data, ManifestClips):
            what, instead = self.takes_pixels
            raise OpenSoraError(
                f"{what}, and {type(self.data).__name__} are latents; use {instead}, or "
                "objective.data.type=ManifestClips"
            )
        if self.degradation is not None and not isinstance(self.diffusion, Flow):
            raise OpenSoraError("objective.degradation is for rectified flow alone; use objective.diffusion.type=Flow")
        if self.few_steps is not None:
            self._check_few_steps()
        if isinstance(self.train, LoRAConfig):
            if self.init_from is None:
                raise OpenSoraError("an adapter is trained beside a model: name it by objective.init_from")
            if isinstance(self.text, TrainedText):
                raise OpenSoraError("an adapter changes the transformer alone; freeze the text encoder: objective.text")
            if self.new_parts:
                raise OpenSoraError("an adapter is trained beside whole weights; leave objective.new_parts out")

    def _check_few_steps(self) -> None:
        """Raises `OpenSoraError` for settings that the path of a teacher has no place for."""
        if self.teacher is None:
            raise OpenSoraError("objective.few_steps are those of a teacher; name the model by objective.teacher")
        if not isinstance(self.diffusion, Flow):
            raise OpenSoraError("objective.few_steps is for rectified flow alone; use objective.diffusion.type=Flow")
        if isinstance(self.text, TrainedText):
            raise OpenSoraError(
                "objective.few_steps reads captions as the teacher does; freeze the text encoder: "
                "objective.text.type=FrozenText"
            )
        if self.drop_text or self.drop_of_known or self.drop_pooled:
            raise OpenSoraError(
                "objective.few_steps is sampled without guidance, so nothing is dropped; give objective.drop_text=0, "
                "and leave objective.drop_pooled and objective.drop_of_known out"
            )
        if self.degradation is not None:
            raise OpenSoraError("objective.few_steps learns of no clips; leave objective.degradation out")

    @property
    def takes_pixels(self) -> tuple[str, str] | None:
        """Which setting encodes frames of clips after they were read, and what does not; None for none."""
        if takes_pixels(self.known_frames):
            return "noisy kinds of objective.known_frames encode clips with noise in them", "kinds without noise"
        if self.degradation is not None:
            return "objective.degradation encodes clips that are made worse", "objective.degradation=none"
        return None

    def idle(self) -> dict[str, str]:
        """Settings that change nothing, and why; see `overrides.apply_overrides`."""
        idle = {}
        if self.transformer is None and self.init_from is not None:
            idle["architecture"] = "the transformer is that of objective.init_from"
        if self.init_from is None:
            idle["new_parts"] = "all parts are new without objective.init_from"
        if isinstance(self.train, LoRAConfig):
            idle["freeze_text_embedder"] = "an adapter alone is trained, and all else stays as it is"
            idle["text.exported"] = "an adapter alone is exported"
        if not isinstance(self.data, ToyboxLatents):
            idle["object_weight"] = "objects are known of the toybox's clips alone"
        else:
            idle["sample_posterior"] = "the latents of the toybox's clips are means"
        if isinstance(self.diffusion, Flow) and not self.diffusion.time_shift:
            idle["diffusion.shift_ratio"] = "times are not shifted without objective.diffusion.time_shift"
        if self.few_steps is not None:
            times = "times are those of the steps of objective.few_steps"
            idle |= {f"diffusion.{name}": times for name in ("loc", "scale", "uniform_above")}
            idle["object_weight"] = "objects are not where they are in the clips; a teacher's path is learnt"
        if not self.known_frames:
            idle["drop_of_known"] = "no frames are known without objective.known_frames"
        return idle


def check_pipeline_defaults(defaults: Mapping[str, Any]) -> None:
    """Raises `OpenSoraError` for keywords that `OpenSoraPipeline` does not take, or not with that value."""
    hints = typing.get_type_hints(OpenSoraPipeline.__init__)
    parts = ("transformer", "scheduler", "autoencoder", "text_encoder", "tokenizer")
    not_settings = (*parts, "trained_on", "distilled_from", "return")
    known = {name: hint for name, hint in hints.items() if name not in not_settings}
    for name, value in defaults.items():
        if name not in known:
            hint = nearest_name(name, known).replace("did you mean ", "did you mean objective.defaults.")
            raise OpenSoraError(f"unknown setting objective.defaults.{name}{hint}")
        build_value(known[name], value, f"objective.defaults.{name}")
