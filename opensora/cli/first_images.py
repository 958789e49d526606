"""`opensora generate --text-to-image`: the pictures that clips begin with are made first."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from opensora.cli.parallel import ParallelOptions
from opensora.cli.progress import quiet_libraries, say
from opensora.errors import OpenSoraError
from opensora.generation.first_images import draw_first_images, first_image_path
from opensora.generation.request import ClipRequest
from opensora.media.write import check_output

if TYPE_CHECKING:
    from opensora.checkpoints.image_pipelines import ImagePipeline


@dataclass(frozen=True)
class Artist:
    """A text-to-image pipeline that is there, and where its pictures will lie.

    Attributes:
        source: the pipeline, not opened.
        paths: of the pictures, one for each clip.
    """

    source: "ImagePipeline"
    paths: tuple[Path, ...]

    @classmethod
    def find(
        cls,
        name: str,
        requests: Sequence[ClipRequest],
        paths: Sequence[Path],
        parallel: ParallelOptions,
        *,
        download: bool = False,
    ) -> "Artist":
        """The pipeline of that name.

        Args:
            name: see `ImagePipeline.find`.
            requests: of the clips.
            paths: of the clips.
            parallel: the first process looks, and fetches.
            download: fetch what is not there.

        Raises:
            OpenSoraError: no such pipeline, frames that are taken from elsewhere, or places that cannot be written.
        """
        for request in requests:
            others = {
                "image": request.image,
                "extend": None if request.backwards else request.extend,
                "edit": request.edit,
                "reference_path": request.reference_path or None,
            }
            for field, other in others.items():
                if other is not None:
                    raise OpenSoraError(
                        f"`text_to_image` makes the picture that the clip begins with; leave out `{field}`"
                    )
        pictures = tuple(map(first_image_path, paths))
        for picture in pictures:
            check_output(picture, "png")
        quiet_libraries()
        from opensora.checkpoints.image_pipelines import ImagePipeline

        return cls(parallel.from_first(lambda: ImagePipeline.find(name, download=download)), pictures)

    def draw(self, requests: Sequence[ClipRequest], parallel: ParallelOptions, *, offload: bool) -> list[ClipRequest]:
        """The requests with their pictures, which the first process makes; the pipeline is gone then.

        Raises:
            OpenSoraError: see `draw_first_images`, or a size that the clips' model cannot make.
        """
        from opensora.checkpoints.loading import choose_device
        from opensora.checkpoints.precision import dtype_named
        from opensora.generation.resolve import resolve_size
        from opensora.models.int8 import computing_dtype
        from opensora.planning.meta_pipeline import meta_pipeline
        from opensora.planning.tracing import Tracer

        request = requests[0]
        clips = meta_pipeline(Tracer(), request.model_name, request.components).pipeline
        size = resolve_size(request, clips.config, clips.size_rule())
        device = choose_device(request.device)
        dtype = computing_dtype(dtype_named(request.dtype, on_cpu=device.type == "cpu"))

        def draw() -> list[ClipRequest]:
            drawn = []
            for one in draw_first_images(
                self.source,
                requests,
                self.paths,
                (size.height, size.width),
                device=device,
                dtype=dtype,
                offload=offload,
            ):
                say(f"first picture: {one.image}")
                drawn.append(one)
            return drawn

        return parallel.from_first(draw)
