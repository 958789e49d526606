"""`opensora generate`: a prompt becomes a video file.

Mistakes that can be seen without the model (prompt, files, output, options) are found before it is loaded, those that
need the model (sizes, channels, frames that do not fit) before sampling starts. The options come in groups, each beside
what is done with it: `sizes.py`, `sampling.py`, `conditions.py`, `refinement.py`, `loading.py`.
"""

import dataclasses
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from tyro.conf import OmitArgPrefixes, Positional, arg

from opensora.checkpoints.published import BUNDLED
from opensora.cli.conditions import FrameOptions, LoopOptions, ReferenceOptions, frames_of_loops, notes_on_files
from opensora.cli.given_files import GivenFiles
from opensora.cli.jobs import Job, check_bundled_words, check_words, plan, read_prompts
from opensora.cli.loading import MachineOptions, MemoryOptions, ModelOptions
from opensora.cli.options import FLAG, flag, given_options, option
from opensora.cli.parallel import ParallelOptions, from_first, own_device
from opensora.cli.record import (
    NamedFrames,
    PlacedReferences,
    Record,
    Sampling,
    changed_versions,
    read_record,
    sidecar_path,
    versions,
)
from opensora.cli.refinement import RefinementOptions, refine_jobs
from opensora.cli.sampling import SamplingOptions, ScoreOptions, resolve_sampling, sample, total_frames
from opensora.cli.sizes import SizeOptions, describe_size
from opensora.errors import OpenSoraError
from opensora.files import check_writable
from opensora.geometry import VideoSize
from opensora.media.write import FORMATS, check_fps, check_size, format_of, write_video
from opensora.settings import nearest_name, save_settings

if TYPE_CHECKING:
    from opensora.pipeline import OpenSoraPipeline

DEFAULT_SEED = 42
DEFAULT_FOLDER = "outputs/"

Given = NamedFrames | PlacedReferences | None

# What may stand beside --from: where things are and go, not what they are.
_FILES_WITH_FROM = ("image", "last_image", "extend", "edit", "reference_path")
_FREE_WITH_FROM = (
    "from_",
    *("model", "download", "transformer", "autoencoder", "text_encoder", "tokenizer", "adapter"),
    *("output", "format", "no_metadata", "device", "dtype"),
    *("offload", "sequential_guidance", "micro_batch_size", "sequence_parallel", "parallel_guidance"),
    *_FILES_WITH_FROM,
)


@dataclass(frozen=True)
class Generate:
    """Turn a prompt into a video.

    What is left out is as the model likes it best. The clip's path goes to stdout, all else to stderr.
    """

    # Options of Open-Sora's scripts that have no counterpart, and what to do instead.
    REFUSED: ClassVar[dict[str, str]] = {
        "--batch-size": "every clip is made by itself, so that it can be made again; leave it out",
        "--llm-refine": "name a language model with --refine-endpoint URL --refine-model NAME",
        "--sample-name": "name the file with --output",
    }

    prompt: Annotated[Positional[str | None], option("PROMPT")] = None
    """What to show."""
    prompts: Annotated[tuple[str, ...] | None, option("TEXT ...", name="prompt")] = None
    """The same, for one prompt or several."""
    prompt_path: Annotated[Path | None, option("FILE")] = None
    """Text file with one prompt a line, in place of PROMPT."""
    start_index: Annotated[int | None, option("N", "0")] = None
    """First line of the file that is made, counted from 0."""
    end_index: Annotated[int | None, option("N", "all")] = None
    """One past the last line that is made."""
    negative_prompt: Annotated[str | None, option("TEXT", "none")] = None
    """What to steer away from."""
    seed: Annotated[int | None, option("N", str(DEFAULT_SEED))] = None
    """Clip number k (counted over all prompts, from 0) has the seed N + k; each can be made again alone."""
    num_videos: Annotated[int | None, option("N", "1", aliases=["--num-sample"])] = None
    """Clips per prompt."""
    from_: Annotated[Path | None, option("FILE", name="from")] = None
    """Make the clip again that this file (or its .json) tells of: the same frames, bit for bit, on the same machine."""
    output: Annotated[str | None, option("PATH", DEFAULT_FOLDER, aliases=["--save-dir"])] = None
    """File (several clips: numbered), or a folder if the name has no ending."""
    format: Annotated[str | None, option("|".join(FORMATS), "by the output's ending, else mp4")] = None
    """File format; png is one sheet of all frames."""
    no_metadata: Annotated[bool, FLAG] = False
    """Keep no record of how the clip was made, neither inside the file nor beside it."""
    model: OmitArgPrefixes[Annotated[ModelOptions, arg(name="model")]] = field(default_factory=ModelOptions)
    size: OmitArgPrefixes[Annotated[SizeOptions, arg(name="size")]] = field(default_factory=SizeOptions)
    sampling: OmitArgPrefixes[Annotated[SamplingOptions, arg(name="sampling")]] = field(default_factory=SamplingOptions)
    scores: OmitArgPrefixes[Annotated[ScoreOptions, arg(name="score")]] = field(default_factory=ScoreOptions)
    frames: OmitArgPrefixes[Annotated[FrameOptions, arg(name="given frame")]] = field(default_factory=FrameOptions)
    loops: OmitArgPrefixes[Annotated[LoopOptions, arg(name="long video")]] = field(default_factory=LoopOptions)
    references: OmitArgPrefixes[Annotated[ReferenceOptions, arg(name="reference")]] = field(
        default_factory=ReferenceOptions
    )
    refinement: OmitArgPrefixes[Annotated[RefinementOptions, arg(name="prompt refinement")]] = field(
        default_factory=RefinementOptions
    )
    machine: OmitArgPrefixes[Annotated[MachineOptions, arg(name="machine")]] = field(default_factory=MachineOptions)
    memory: OmitArgPrefixes[Annotated[MemoryOptions, arg(name="memory")]] = field(default_factory=MemoryOptions)
    parallel: OmitArgPrefixes[Annotated[ParallelOptions, arg(name="several processes")]] = field(
        default_factory=ParallelOptions
    )

    def run(self) -> None:
        """Makes the clips, alone or together with other processes."""
        with self.parallel.joined() as is_first:
            self._make(is_first)

    def _make(self, is_first: bool) -> None:
        """Makes the clips; the first process writes them."""
        record = self._record()
        self._check()
        jobs = self._jobs(record)
        model = self.model.name(record)
        negative_prompt = record.negative_prompt if record else self.negative_prompt
        refiner = self.refinement.refiner(closed_vocabulary=model if model in BUNDLED else None)
        texts = [text for job in jobs for text in self._texts(job, record)]
        texts += [negative_prompt] if negative_prompt else []
        if model in BUNDLED:
            check_bundled_words(model, texts)
        kind = format_of(jobs[0].path, self.format)  # all have the same ending
        self.size.check(kind)
        files = GivenFiles()
        given = [self._given(job, record, files) for job in jobs]
        for job in jobs:
            files.check_not_overwritten(job.path)
            check_writable(job.path)
            check_writable(sidecar_path(job.path))
        self.model.locate(record)
        if refiner is not None:
            jobs = from_first(lambda: refine_jobs(refiner, jobs))
            texts = [text for job in jobs for text in self._texts(job, record)]
            for prompt in dict.fromkeys(job.shown for job in jobs):
                _say(f"refined prompt: {prompt}")

        device, dtype = (record.device, record.dtype) if record else (None, None)
        place = (self.machine.device or own_device(device), self.machine.dtype or dtype)
        pipe, model_hash = self.model.load(*place, self.memory, record)
        self.parallel.set_up(pipe)
        if record and (changed := changed_versions(record)):
            _say(f"note: {', '.join(changed)} since this clip was made; its frames may come out slightly different")
        check_words(pipe, texts)
        sampling = self._sampling(pipe, given, files, record)
        num_frames = total_frames(pipe, sampling)
        check_fps(sampling.file_fps, kind)
        check_size(kind, num_frames, sampling.height, sampling.width)
        size = describe_size(VideoSize(num_frames, sampling.height, sampling.width), sampling.nominal_size)
        if self.size.names_a_size:
            _say(f"making {size}")
        given = [_with_alignment(of_job, pipe) for of_job in given]
        for note in dict.fromkeys(note for of_job in given for note in notes_on_files(of_job, files, sampling)):
            _say(f"note: {note}")
        with pipe.resident("autoencoder"):
            frames_of = {of_job: frames_of_loops(pipe, of_job, files, sampling) for of_job in dict.fromkeys(given)}

        sampling_s = 0.0
        for job, of_job in zip(jobs, given, strict=True):
            before = time.perf_counter()
            frames, settings = sample(pipe, job.shown, negative_prompt, job.seed, sampling, frames_of[of_job])
            sampling_s += time.perf_counter() - before
            if not is_first:
                continue
            made = None
            if not self.no_metadata:
                made = Record(
                    prompt=job.prompt,
                    negative_prompt=negative_prompt,
                    seed=job.seed,
                    model=self.model.recorded_name(record),
                    model_hash=model_hash,
                    sampling=sampling,
                    device=str(pipe.device),
                    dtype=settings["dtype"],
                    pipeline={name: settings.get(name) for name in ("scheduler", "guider", "latent_space")},
                    versions=versions(),
                    refined_prompt=job.refined_prompt,
                    given=of_job,
                    components={name: path.name for name, path in self.model.components.items()},
                    adapters=tuple(self.model.adapters(record).values()),
                )
            write_video(job.path, frames, sampling.file_fps, made.as_metadata() if made else None, format=kind)
            if made:
                save_settings(made, sidecar_path(job.path))
            else:  # one that is there tells of the clip that was there
                sidecar_path(job.path).unlink(missing_ok=True)
            print(job.path, flush=True)
        clips = "" if len(jobs) == 1 else f"{len(jobs)} times "
        _say(
            f"{clips}{size}; {sampling.file_fps:g} fps, {sampling.num_inference_steps} steps: "
            f"{_process_seconds():.1f} s from start to end, {sampling_s:.1f} s of it sampling and decoding; "
            f"peak memory {_peak_memory(pipe)}"
        )

    def _record(self) -> Record | None:
        if self.from_ is None:
            return None
        for name, _ in given_options(self):
            if name not in _FREE_WITH_FROM:
                given = "a prompt" if name in ("prompt", "prompts") else flag(name)
                raise OpenSoraError(f"--from makes the same clip again, so it cannot be combined with {given}")
        return read_record(self.from_)

    def _check(self) -> None:
        """What can be said of the options without knowing the model."""
        if self.format is not None and self.format not in FORMATS:
            raise OpenSoraError(f"unknown format {self.format!r}{nearest_name(self.format, FORMATS)}")
        self.machine.check()
        self.memory.check()
        self.parallel.check(device=self.machine.device, sequential_guidance=self.memory.sequential_guidance)
        self.sampling.check()
        self.scores.parse()
        if self.from_ is None:
            self.frames.check()
            self.loops.check(self.frames)

    def _jobs(self, record: Record | None) -> list[Job]:
        output = self.output or DEFAULT_FOLDER
        if record and self.from_:
            clip = self.from_.with_suffix("") if self.from_.suffix.lower() == ".json" else self.from_
            suffix = clip.suffix.lower()
            suffix = suffix if suffix.removeprefix(".") in FORMATS else ".mp4"
            path = plan(read_prompts([record.prompt], None), 1, record.seed, output, self.format, suffix)[0].path
            return [Job(record.prompt, record.seed, path, refined_prompt=record.refined_prompt)]
        if self.prompt is not None and self.prompts is not None:
            raise OpenSoraError("PROMPT and --prompt both say what to show; give one of them")
        given = self.prompts or (() if self.prompt is None else (self.prompt,))
        prompts = read_prompts(given, self.prompt_path, self.start_index, self.end_index)
        num_videos = 1 if self.num_videos is None else self.num_videos
        return plan(prompts, num_videos, DEFAULT_SEED if self.seed is None else self.seed, output, self.format, ".mp4")

    def _texts(self, job: Job, record: Record | None) -> list[str]:
        """The prompt of a job, or its texts for loops."""
        loops = LoopOptions(loop=record.sampling.num_loops) if record else self.loops
        return loops.check_prompt(job.shown)

    def _given(self, job: Job, record: Record | None, files: GivenFiles) -> Given:
        """The frames given for a job, with their files read."""
        if record and self.from_:
            where = [value for name, value in given_options(self) if name in _FILES_WITH_FROM]
            paths = [Path(path) for value in where for path in str(value).split(";") if path]
            files.find(record.given.files if record.given else (), paths, self.from_)
            return record.given
        named = self.frames.read(files)
        placed = self.references.read(job.references, self.loops.num_loops, files)
        if named and placed:
            raise OpenSoraError(
                "frames are given in two ways: by --image, --extend or --edit, and by references with a mask strategy; "
                "use one of them"
            )
        return named or placed

    def _sampling(
        self, pipe: "OpenSoraPipeline", given: list[Given], files: GivenFiles, record: Record | None
    ) -> Sampling:
        """The recorded settings, or what was asked for completed by the model's own."""
        if record:
            if record.sampling.sampler is not None:
                pipe.use_sampler(record.sampling.sampler)
            record.sampling.size.check(pipe.size_rule())
            return record.sampling
        if self.sampling.sampler is not None:
            pipe.use_sampler(self.sampling.sampler)
        edit = given[0].edit if isinstance(given[0], NamedFrames) else None
        length = len(files[edit].frames) if edit else None
        size = self.size.resolve(pipe.config, pipe.size_rule(), length)
        if length is not None and size.num_frames < length:
            _say(f"note: the first {size.num_frames} of {length} frames are edited")
        return resolve_sampling(pipe, size, self.sampling, self.scores, self.loops)


def _with_alignment(given: Given, pipe: "OpenSoraPipeline") -> Given:
    """Placed references take the model's alignment where they have none of their own."""
    if isinstance(given, PlacedReferences) and given.alignment is None:
        return dataclasses.replace(given, alignment=pipe.config.frame_alignment)
    return given


def _process_seconds() -> float:
    """Since the process started, imports included."""
    import psutil

    return time.time() - psutil.Process().create_time()


def _peak_memory(pipe: "OpenSoraPipeline") -> str:
    import torch

    if pipe.device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(pipe.device) / 2**30:.2f} GB on the device"
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return f"{peak / (2**30 if sys.platform == 'darwin' else 2**20):.2f} GB"
    except ImportError:  # Windows
        import psutil

        memory = psutil.Process().memory_info()
        return f"{getattr(memory, 'peak_wset', memory.rss) / 2**30:.2f} GB"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
