"""From a claimed job to a clip on the disk, with its pictures."""

import time

from torch import Tensor

from opensora.generation.clip import Clip
from opensora.generation.inputs import InputFiles
from opensora.generation.loading import locate_model
from opensora.generation.progress import Progress
from opensora.generation.request import ClipRequest
from opensora.server.child import ChildSettings
from opensora.server.colours import LatentColours
from opensora.server.engines import Engines
from opensora.server.folder import ServerFolder
from opensora.server.jobs import Job, JobResult
from opensora.server.pictures import Previews, write_channels, write_pictures
from opensora.server.settings import InputLimits, check_clip_pixels
from opensora.server.watch import JobWatch


class ClipMaker:
    """Makes clips with the models of this machine.

    Args:
        folder: of the server.
        engines: loaded models.
        colours: of their latents, for previews.
        limits: of what was sent, and of the clip.
    """

    def __init__(self, folder: ServerFolder, engines: Engines, colours: LatentColours, limits: InputLimits) -> None:
        self.folder, self.engines, self.colours, self.limits = folder, engines, colours, limits

    @classmethod
    def of(cls, told: ChildSettings) -> "ClipMaker":
        """For a worker of these settings.

        Raises:
            OpenSoraError: no such device, or a model that is not on this machine.
        """
        folder, settings = ServerFolder(told.server.folder), told.server
        for model in settings.models:
            locate_model(ClipRequest("", model=model))
        engines = Engines(told.device or None, settings.max_memory_bytes)
        return cls(folder, engines, LatentColours(folder.colours), settings.inputs)

    def make(self, job: Job, watch: JobWatch) -> JobResult:
        """See `worker.Maker`."""
        request = self.folder.rooted(job.request)
        engine = self.engines.of(request)
        began = time.monotonic()
        with watch.reading(self.limits.read_s):
            prepared = engine.prepare([request], InputFiles(self.limits.pixels))[0]
        codec, sampling = prepared.pipeline.autoencoder, prepared.sampling
        check_clip_pixels(sampling.height, sampling.width, prepared.num_frames, self.limits.clip_pixels)
        colours = self.colours.of(codec)
        previews = Previews(self.folder.preview(job.id), colours, sampling.size.num_frames / sampling.file_fps)
        latents: Tensor | None = None

        def tell(progress: Progress) -> None:
            nonlocal latents
            latents = latents if progress.latents is None else progress.latents
            watch.tell(progress, previews.show(progress))

        clip = engine.make(prepared, on_progress=tell, cancelled=watch.is_over)
        if colours is None and latents is not None and sampling.num_loops == 1:
            self.colours.learn(codec, latents[0], clip.frames)
        watch.say("writing")
        return self._write(job, clip, latents, time.monotonic() - began)

    def _write(self, job: Job, clip: Clip, latents: Tensor | None, making_s: float) -> JobResult:
        path = clip.save(self.folder.new_clip(job))
        num_frames, height, width, _ = clip.frames.shape
        name, num_bytes = self.folder.name_of(path), path.stat().st_size
        result = JobResult(name, num_bytes, height, width, num_frames, clip.fps, making_s)
        write_pictures(clip.frames, self.folder.thumbnail(result), self.folder.spritesheet(result))
        if latents is not None:
            write_channels(latents[0], self.folder.channels(result))
        self.folder.flush(job)
        return result
