"""The autoencoder that is looked at, and who was trained on its latents.

A transformer only works on the latents it was trained on, so a latent space that one was trained on stays as it is,
right or wrong. Who was, is told by the model's folder, by the weights of a bundled model, or by the declaration of a
published one.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opensora.checkpoints.folders import PIPELINE_INDEX, is_pipeline, locate, read_index
from opensora.checkpoints.published import BUNDLED, PUBLISHED, component_folders, published_name
from opensora.checkpoints.published_parts import PublishedPart
from opensora.checkpoints.source import ModelSource, Part, find_part
from opensora.diffusion.process import NoiseProcess
from opensora.errors import OpenSoraError
from opensora.lab.latents.clips import TOYBOX, VideoSize
from opensora.models.autoencoders.codec import VideoCodec
from opensora.models.autoencoders.latent_space import LatentSpace
from opensora.weights import fingerprint, read_weights

_USUAL_FRAMES, _USUAL_SIDE_PX, _TOY_SIDE_PX = 16, 256, 64


@dataclass(frozen=True)
class Subject:
    """An autoencoder before it is loaded.

    Attributes:
        name: of the model or the autoencoder, as it was asked for.
        part: where it lies.
        whole: whether it was asked for as part of a model.
        defaults: keywords of that model's pipeline.
        process: how that model was trained; None where nobody says.
    """

    name: str
    part: Part
    whole: bool = False
    defaults: dict[str, Any] = field(default_factory=dict)
    process: NoiseProcess | None = None

    @classmethod
    def find(cls, name_or_path: str) -> "Subject":
        """The autoencoder of a model, or one that stands alone.

        Args:
            name_or_path: a model's name or folder, or the folder or file of an autoencoder.

        Raises:
            OpenSoraError: no such model, or one without an autoencoder.
        """
        part = find_part(name_or_path, "autoencoder")
        if published_name(name_or_path) is None and not is_pipeline(locate(name_or_path)):
            return cls(name_or_path, part)
        source = ModelSource.find(name_or_path, on_disk=False)
        return cls(name_or_path, part, True, source.defaults, _process_of(source))

    def load(self, device: Any = "cpu") -> VideoCodec:
        """The autoencoder in float32.

        Raises:
            OpenSoraError: it is none of this family, or damaged.
        """
        codec = self.part.load(device=device)
        if not isinstance(codec, VideoCodec):
            raise OpenSoraError(f"{self.name} is a {type(codec).__name__}; expected a video autoencoder")
        return codec.eval()

    def size(
        self, codec: VideoCodec, data: str, num_frames: int | None, height: int | None, width: int | None
    ) -> VideoSize:
        """The size of clips: what is given, else the model's own, else one that any machine can encode.

        Raises:
            OpenSoraError: clips of that size cannot be encoded; the nearest that can are named.
        """
        factor = codec.spatial_factor
        side = max(factor, (_TOY_SIDE_PX if data == TOYBOX else _USUAL_SIDE_PX) // factor * factor)
        frames = codec.micro_frame_size or codec.size_rule().frames_from(_USUAL_FRAMES)
        usual = {"num_frames": frames, "height": side, "width": side}
        usual |= {name: self.defaults[name] for name in usual if self.defaults.get(name)}
        given = {"num_frames": num_frames, "height": height, "width": width}
        size = VideoSize(**{name: usual[name] if value is None else value for name, value in given.items()})
        codec.latent_size((size.num_frames, size.height, size.width))
        return size

    def trained_on(self, codec: VideoCodec) -> str:
        """Who was trained on these latents, in words; "" where nobody is known.

        Args:
            codec: the same, loaded.
        """
        if self.whole:
            return f"the transformer of {self.name}"
        folder = self.part.path.resolve().parent
        if (folder / PIPELINE_INDEX).is_file():
            own = component_folders(folder, read_index(folder)).get("autoencoder")
            if own is not None and own.resolve() == self.part.path.resolve():
                return f"the transformer of {folder}"
        mark = fingerprint(read_weights(self.part.path, "autoencoder"))
        for name, model in BUNDLED.items():
            if (read_index(model.folder).get("trained_on") or {}).get("autoencoder") == mark:
                return f"the transformer of {name}"
        names = [name for name, model in PUBLISHED.items() if _is_published(codec, model.autoencoder)]
        return f"a released transformer ({', '.join(names)})" if names else ""


def _is_published(codec: VideoCodec, part: PublishedPart) -> bool:
    """Whether it declares what published weights of its class declare, and is as large where that tells little."""
    if part.class_name != f"{type(codec).__module__}.{type(codec).__name__}":
        return False
    theirs = LatentSpace.from_dict(part.config["latent_space"])
    if codec.latent_space.declared_by_weights.differences(theirs):
        return False
    sizes = {name: value for name, value in part.config.items() if name in ("spatial", *_SIZES)}
    return theirs.shift is not None or all(_same(codec.config.get(name), value) for name, value in sizes.items())


_SIZES = ("latent_channels", "widths", "block_out_channels", "filters", "channel_multipliers")


def _same(ours: Any, theirs: Any) -> bool:
    """Whether a configuration says what a published one says, which may say less."""
    if isinstance(theirs, dict):
        return isinstance(ours, dict) and all(_same(ours.get(name), value) for name, value in theirs.items())
    return list(ours or ()) == list(theirs) if isinstance(theirs, list | tuple) else ours == theirs


def _process_of(source: ModelSource) -> NoiseProcess | None:
    """How a model was trained; None for a scheduler that nothing is trained with."""
    scheduler = source.parts.get("scheduler")
    try:
        return None if scheduler is None else scheduler.load_settings().noise_process()
    except OpenSoraError:
        return None


def lies_in_package(path: Path) -> bool:
    """Whether an autoencoder is a bundled model's, whose files belong to the installation."""
    inside = path.resolve()
    return any(inside.is_relative_to(model.folder.resolve()) for model in BUNDLED.values())
