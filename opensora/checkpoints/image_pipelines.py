"""Text-to-image pipelines of diffusers, by a published name, from a folder or a repository in the Hub's local cache.

One is opened as it is: diffusers knows how. What it may hold is checked before: networks of diffusers and transformers,
weights in safetensors, and no code of its own.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from opensora.checkpoints import hub
from opensora.checkpoints.file_hashes import file_hash
from opensora.checkpoints.folders import PIPELINE_INDEX, is_repository
from opensora.containers.tensors import first_line
from opensora.contents import read_object
from opensora.errors import OpenSoraError, is_out_of_memory
from opensora.settings import nearest_name

_FILES = (PIPELINE_INDEX, "*/*")
"""Of a repository: what lies beside the components are the same weights once more."""


@dataclass(frozen=True)
class ImageModel:
    """A published text-to-image pipeline, and how it is used for first images.

    Attributes:
        repository: on the Hub.
        side_px: height and width of a square image; of others the same number of pixels.
        options: of a call.
    """

    repository: str
    side_px: int
    options: Mapping[str, Any] = field(default_factory=dict)


IMAGE_MODELS = {
    "flux.1-dev": ImageModel("black-forest-labs/FLUX.1-dev", 768, {"num_inference_steps": 50, "guidance_scale": 4.0}),
}
"""Known by name. FLUX.1 [dev], whose licence is non-commercial, is what Open-Sora 2.0 makes its first images with."""


@dataclass(frozen=True)
class ImagePipeline:
    """A pipeline that was found and not opened yet.

    Attributes:
        name: as it was asked for.
        folder: where it lies.
        class_name: in diffusers.
        components: names of its parts.
        model: the table's entry, of those in it.
    """

    name: str
    folder: Path
    class_name: str
    components: tuple[str, ...]
    model: ImageModel | None = None

    @classmethod
    def find(cls, name: str, *, download: bool = False) -> "ImagePipeline":
        """A pipeline by name, folder or repository.

        Args:
            name: one of `IMAGE_MODELS`, a folder, or "somebody/model", with "@revision" behind it if you like.
            download: fetch what the Hub's cache lacks of it.

        Raises:
            OpenSoraError: it is not there, is no text-to-image pipeline of diffusers, or names parts of other packages.
        """
        model = IMAGE_MODELS.get(name)
        folder = _folder(name, model.repository if model else name, download)
        index = read_object(folder / PIPELINE_INDEX)
        named = index.get("_class_name")
        class_name = str(named[-1] if isinstance(named, list) and named else named)
        if isinstance(named, list) or not _makes_images(class_name):
            raise OpenSoraError(
                f"`text_to_image`: {name} is of the class {class_name}, expected a text-to-image pipeline of diffusers"
            )
        parts = {key: value for key, value in index.items() if isinstance(value, list) and len(value) == 2}
        parts = {key: value for key, value in parts.items() if value != [None, None]}
        for part, (library, _) in parts.items():
            if not _is_known(library):
                raise OpenSoraError(
                    f"`text_to_image`: the {part} of {name} is from {library!r}, expected diffusers or transformers; "
                    "code of a pipeline's own is not run"
                )
        return cls(name, folder, class_name, tuple(parts), model)

    @property
    def name_alone(self) -> str:
        """A name as it is; of a folder its name alone."""
        return self.name if self.model or is_repository(self.name) else self.folder.resolve().name

    def open(self, device: torch.device, dtype: torch.dtype, *, offload: bool = False) -> Any:
        """The pipeline of diffusers, ready to run.

        Args:
            device: where it runs.
            dtype: precision of its networks.
            offload: each network is on an accelerator only while it works.

        Raises:
            OpenSoraError: a missing or damaged file, or weights in another format than safetensors.
        """
        from diffusers import AutoPipelineForText2Image

        try:
            pipeline = AutoPipelineForText2Image.from_pretrained(
                self.folder, dtype=dtype, local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise OpenSoraError(f"`text_to_image`: {self.name} cannot be opened: {first_line(error)}") from error
        pipeline.set_progress_bar_config(disable=True)
        if offload and device.type != "cpu":
            pipeline.enable_model_cpu_offload(device=device)
            return pipeline
        return pipeline.to(device)

    def hash(self) -> str:
        """SHA-256 over the files of its parts, by name and content; 64 hexadecimal digits."""
        files = [self.folder / PIPELINE_INDEX]
        for part in self.components:
            files += sorted(file for file in (self.folder / part).rglob("*") if file.is_file())
        names = [file.relative_to(self.folder).as_posix() for file in files]
        hashes = [hub.content_hash(file) or file_hash(file) for file in files]
        listed = "".join(f"{name}\0{digest}\n" for name, digest in zip(names, hashes, strict=True))
        return hashlib.sha256(listed.encode()).hexdigest()


def _folder(name: str, place: str, download: bool) -> Path:
    if is_repository(place):
        if download:
            hub.download_repository(place, _FILES)
        found = hub.snapshot(place)
        if found is None or not (found / PIPELINE_INDEX).is_file():
            raise OpenSoraError(
                f"`text_to_image`: {name} is not on this machine; fetch it with `download`, or by: "
                f"{hub.repository_command(place)} --include {PIPELINE_INDEX} '*/*'"
            )
        return found
    folder = Path(place).expanduser()
    if not (folder / PIPELINE_INDEX).is_file():
        what = f"{name} holds no {PIPELINE_INDEX}" if folder.exists() else f"{name} does not exist"
        known = nearest_name(name, IMAGE_MODELS)
        raise OpenSoraError(
            f"`text_to_image`: {what}{known}; expected a folder of a text-to-image pipeline of diffusers"
        )
    return folder


def _makes_images(class_name: str) -> bool:
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

    return class_name in {cls.__name__ for cls in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()}


def _is_known(library: Any) -> bool:
    from diffusers import pipelines

    return library in ("diffusers", "transformers") or (isinstance(library, str) and hasattr(pipelines, library))
