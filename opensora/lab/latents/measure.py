"""Writes the shift and scale of an autoencoder's latents into its configuration, with what they were measured on.

Only for autoencoders that nothing was trained on yet: a transformer keeps the latent space that it learnt. Both figures
are also in some weights, so these are written anew with the configuration, in the precision they had.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from opensora import __version__
from opensora.checkpoints.conversion import check_output, stored_dtype
from opensora.checkpoints.report import inspect_component
from opensora.containers.files import weight_files
from opensora.errors import OpenSoraError
from opensora.files import replacing_folder
from opensora.lab.latents.clips import Clips
from opensora.lab.latents.subject import Subject, lies_in_package
from opensora.models.autoencoders.codec import VideoCodec
from opensora.models.autoencoders.declared import DeclaredCodec
from opensora.models.autoencoders.latent_space import LatentSpace
from opensora.weights import cast_weights


def target(subject: Subject, codec: VideoCodec, output: Path | None, *, in_place: bool, from_scratch: bool) -> Path:
    """The folder that is to be written, looked at before anything is measured.

    Args:
        subject: the autoencoder.
        codec: the same, loaded.
        output: a new folder; None with `in_place`.
        in_place: the autoencoder's own folder.
        from_scratch: whatever was trained on its latents is left behind.

    Raises:
        OpenSoraError: neither or both are asked for, something is in the way, or a transformer was trained on these
            latents.
    """
    if in_place == (output is not None):
        raise OpenSoraError("the result goes to a new folder (`output`) or into the autoencoder's own (`in_place`)")
    trained = subject.trained_on(codec)
    if trained and in_place:
        raise OpenSoraError(
            f"{trained} was trained on the latents of {subject.name} as they are, and would make noise of others; "
            "leave it as it is, and write another autoencoder with `output` and `from_scratch`"
        )
    if trained and not from_scratch:
        raise OpenSoraError(
            f"{trained} was trained on the latents of {subject.name} as they are, and would make noise of others; if "
            "a transformer is to be trained from scratch on the new ones, say so with `from_scratch`"
        )
    if output is not None:
        check_output(output)
        return output
    folder = subject.part.path
    if lies_in_package(folder) or not (folder / "config.json").is_file():
        raise OpenSoraError(f"{folder} is no folder of an autoencoder of its own; write another with `output`")
    return folder


def measure(
    subject: Subject, codec: VideoCodec, clips: Clips, folder: Path, on_clip: Callable[[int], None]
) -> LatentSpace:
    """Measures mean and deviation of each channel and writes the autoencoder with them.

    Args:
        subject: the autoencoder.
        codec: the same, loaded in float32.
        clips: what is encoded.
        folder: what is written, whole or not at all, see `target`.
        on_clip: told how many clips are done.

    Returns:
        The declaration.

    Raises:
        OpenSoraError: an autoencoder whose latent space is fixed, a channel that never changes, or clips of which none
            can be used. Nothing is written then.
    """
    if not isinstance(codec, DeclaredCodec):
        raise OpenSoraError(f"the latent space of a {type(codec).__name__} is fixed, there is nothing to write")
    device = next(codec.parameters()).device

    def videos() -> Iterator[Tensor]:
        for number, video in enumerate(clips, start=1):
            yield video.to(device)
            on_clip(number)

    codec.measure_latent_space(videos(), f"opensora {__version__}")
    found = replace(codec.latent_space, trained_with=f"{clips.said}; measured by opensora {__version__}")
    codec.set_latent_space(found)
    dtype = stored_dtype(subject.part.path, "autoencoder")
    with replacing_folder(folder, overwrite=folder == subject.part.path) as temporary:
        if folder == subject.part.path:
            _keep_others(folder, temporary)
        cast_weights(codec, dtype)
        codec.save_pretrained(temporary)
        report = inspect_component(temporary)[0]
        if report.problems:
            raise OpenSoraError(report.problems[0].replace(str(temporary), str(folder)))
    return found


def _keep_others(folder: Path, temporary: Path) -> None:
    """Copies what lies beside weights and configuration."""
    written = {"config.json", *(file.name for file in weight_files(folder))}
    shutil.copytree(
        folder,
        temporary,
        ignore=lambda _, names: [name for name in names if name in written or name.endswith(".index.json")],
        dirs_exist_ok=True,
    )
