"""`opensora generate`: a prompt becomes a video file.

Mistakes that can be seen without the model (prompt, files, output, options) are found before it is loaded, those that
need the model (sizes, channels, frames that do not fit) before sampling starts.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from opensora.checkpoints.published import BUNDLED
from opensora.cli.fitting import fitted
from opensora.cli.generate_options import (
    PARTS,
    FrameOptions,
    LoopOptions,
    MachineOptions,
    MemoryOptions,
    ModelOptions,
    ReferenceOptions,
    RefinementOptions,
    SamplingOptions,
    ScoreOptions,
    SizeOptions,
)
from opensora.cli.options import FLAG, flag, given_options, option
from opensora.cli.parallel import ParallelOptions, own_device
from opensora.cli.progress import StepBar, quiet_libraries, say
from opensora.errors import OpenSoraError, saying_what_is_kept
from opensora.files import check_writable
from opensora.generation.batch import (
    STANDARD_INPUT,
    Prompts,
    output_paths,
    random_seed,
    read_prompts,
    requests_of,
    written_of,
)
from opensora.generation.inputs import InputFiles, find_files
from opensora.generation.loading import locate_model
from opensora.generation.record import Record, changed_versions, read_record, request_of, sidecar_path
from opensora.generation.request import DEFAULT_SEED, FILES, ClipRequest, split_paths
from opensora.generation.resolve import describe_size
from opensora.generation.words import check_bundled_words
from opensora.geometry import VideoSize
from opensora.media.write import FORMATS, check_fps, check_output, check_size, format_of, timing_note
from opensora.settings import nearest_name

if TYPE_CHECKING:
    from opensora.cli.first_images import Artist
    from opensora.generation.engine import Engine
    from opensora.generation.prepared import PreparedClip

DEFAULT_FOLDER = "outputs/"

# What may stand beside --from: where things are and go, not what they are.
_FREE_WITH_FROM = (
    "from_",
    *("model", "download", *PARTS, "adapter"),
    *("output", "format", "no_metadata", "device", "dtype"),
    *("max_memory", "offload", "sequential_guidance", "micro_batch_size", "tile_frames"),
    *("sequence_parallel", "parallel_guidance"),
    *FILES,
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
        "--duration": "seconds are a number of frames too: --num-frames 2s",
        "--steps": "write --num-inference-steps N",
        "--size": "height and width are two numbers: --image-size H W",
        "--negative": "write --negative-prompt TEXT",
        "--scale": "how strongly the prompt is followed is --guidance-scale S",
    }

    prompt: Annotated[Positional[str | None], option("PROMPT")] = None
    """What to show; - reads prompts from standard input, one a line."""
    prompts: Annotated[tuple[str, ...] | None, option("TEXT ...", name="prompt")] = None
    """The same, for one prompt or several."""
    prompt_path: Annotated[Path | None, option("FILE")] = None
    """Text file with one prompt a line, in place of PROMPT; - for standard input."""
    skip_comments: Annotated[bool, FLAG] = False
    """Lines of the file that begin with # are no prompts."""
    start_index: Annotated[int | None, option("N", "0")] = None
    """First line of the file that is made, counted from 0."""
    end_index: Annotated[int | None, option("N", "all")] = None
    """One past the last line that is made."""
    negative_prompt: Annotated[str | None, option("TEXT", "none")] = None
    """What to steer away from."""
    seed: Annotated[int | Literal["random"] | None, option("N|random", str(DEFAULT_SEED))] = None
    """Clip number k (counted over all prompts, from 0) has the seed N + k; each can be made again alone."""
    num_videos: Annotated[int | None, option("N", "1", aliases=["--num-sample"])] = None
    """Clips per prompt."""
    from_: Annotated[Path | None, option("FILE", name="from")] = None
    """Make the clip again that this file (or its .json) tells of: the same frames, bit for bit, on the same machine."""
    output: Annotated[str | None, option("PATH", DEFAULT_FOLDER, aliases=["--save-dir"])] = None
    """File (several clips: numbered), a folder if the name has no ending or ends in /, or FOLDER/%04d.png."""
    format: Annotated[str | None, option("|".join(FORMATS), "by the output's ending, else mp4")] = None
    """File format; mkv and png keep exact pixels, png as one sheet, frames as a folder of numbered png files."""
    no_metadata: Annotated[bool, FLAG] = False
    """Keep no record of how the clip was made, neither inside the file nor beside it."""
    model: OmitArgPrefixes[Annotated[ModelOptions, arg(name="model")]] = field(default_factory=ModelOptions)
    size: OmitArgPrefixes[Annotated[SizeOptions, arg(name="size")]] = field(default_factory=SizeOptions)
    sampling: OmitArgPrefixes[Annotated[SamplingOptions, arg(name="sampling")]] = field(default_factory=SamplingOptions)
    scores: OmitArgPrefixes[Annotated[ScoreOptions, arg(name="score")]] = field(default_factory=ScoreOptions)
    frames: OmitArgPrefixes[Annotated[FrameOptions, arg(name="frame conditioning")]] = field(
        default_factory=FrameOptions
    )
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
        if self.format is not None and self.format not in FORMATS:
            raise OpenSoraError(f"unknown format {self.format!r}{nearest_name(self.format, FORMATS)}")
        self.parallel.check(device=self.machine.device, sequential_guidance=self.memory.sequential_guidance)
        requests, paths = self._clips(record)
        request = requests[0]  # model and machine are those of all
        model = request.model_name
        refiner = self.refinement.refiner(closed_vocabulary=model if model in BUNDLED else None)
        kind = format_of(paths[0], self.format)  # all have the same ending
        for one in requests:
            one.check(kind)
        if model in BUNDLED:
            texts = [text for one in requests for text in one.texts()]
            check_bundled_words(model, [*texts, *filter(None, [request.negative_prompt])])
        files = InputFiles()
        for one, path in zip(requests, paths, strict=True):
            files.read(one)
            files.check_not_overwritten(path)
            check_output(path, kind)
            check_writable(sidecar_path(path))
        artist = self._artist(requests, paths)
        self._locate(request, record)
        memory = self.memory
        if memory.max_memory is not None:
            dtype, memory = fitted(request, memory)
            requests = [dataclasses.replace(one, dtype=dtype) for one in requests]
            request = requests[0]
        if refiner is not None:
            refined = self.parallel.from_first(
                lambda: {text: refiner.refine(text) for text in {one.prompt: 0 for one in requests}}
            )
            requests = [dataclasses.replace(one, refined_prompt=refined[one.prompt]) for one in requests]
            for prompt in refined.values():
                say(f"refined prompt: {prompt}")
        if artist is not None:
            requests = artist.draw(requests, self.parallel, offload=memory.offload is not None)
        engine = self._engine(request, memory, record)
        if record and (changed := changed_versions(record)):
            say(f"note: {', '.join(changed)} since this clip was made; its frames may come out slightly different")
        clips = engine.prepare(requests, files)
        size = self._say_what_is_made(clips, kind)

        sampling_s, metadata = 0.0, not self.no_metadata
        written: list[Path] = []
        with saying_what_is_kept(lambda: written_of(written, paths)):
            for clip, path in zip(clips, paths, strict=True):
                before = time.perf_counter()
                with StepBar() as bar:
                    made = engine.make(clip, on_progress=bar.update)
                sampling_s += time.perf_counter() - before
                if is_first:
                    written.append(made.save(path, format=kind, metadata=metadata))
                    print(path, flush=True)
        from opensora.generation.measure import peak_memory, process_seconds

        sampling = clips[0].sampling
        if made.num_forecast:
            computed, how = made.num_evaluations, f"fast {sampling.fast}" if sampling.fast else "by a plan of its own"
            say(f"made with {computed} of {computed + made.num_forecast} evaluations of the network, {how}")
        say(
            f"{'' if len(clips) == 1 else f'{len(clips)} times '}{size}; {sampling.file_fps:g} fps, "
            f"{sampling.num_inference_steps} steps: {process_seconds():.1f} s from start to end, "
            f"{sampling_s:.1f} s of it sampling and decoding; peak memory {peak_memory(engine.pipeline.device)}"
        )

    def _record(self) -> Record | None:
        if self.from_ is None:
            return None
        for name, _ in given_options(self):
            if name not in _FREE_WITH_FROM:
                given = "a prompt" if name in ("prompt", "prompts") else flag(name)
                raise OpenSoraError(f"--from makes the same clip again, so it cannot be combined with {given}")
        return read_record(self.from_)

    def _clips(self, record: Record | None) -> tuple[list[ClipRequest], list[Path]]:
        """What is to be made, and where."""
        output = self.output or DEFAULT_FOLDER
        if record and self.from_:
            clip = self.from_.with_suffix("") if self.from_.suffix.lower() == ".json" else self.from_
            suffix = clip.suffix.lower()
            suffix = suffix if suffix.removeprefix(".") in FORMATS else ".mp4"
            requests = [self._request_of(record, self.from_)]
            return requests, output_paths(requests, output, self.format, suffix)
        if self.prompt is not None and self.prompts is not None:
            raise OpenSoraError("PROMPT and --prompt both say what to show; give one of them")
        given = self.prompts or (() if self.prompt is None else (self.prompt,))
        if given == (str(STANDARD_INPUT),) and self.prompt_path is None:
            prompts = self._read_prompts((), STANDARD_INPUT)
        else:
            prompts = self._read_prompts(given, self.prompt_path)
        num_videos = 1 if self.num_videos is None else self.num_videos
        requests = requests_of(prompts, self._request(), num_videos)
        numbers = range(prompts.start * num_videos, prompts.end * num_videos)
        several = num_videos * len(prompts.texts) > 1
        return requests, output_paths(requests, output, self.format, ".mp4", numbers=numbers if several else None)

    def _read_prompts(self, given: Sequence[str], path: Path | None) -> Prompts:
        """The same ones on every process, of which the first reads standard input."""

        def read() -> Prompts:
            return read_prompts(given, path, self.start_index, self.end_index, skip_comments=self.skip_comments)

        return self.parallel.from_first(read) if path == STANDARD_INPUT else read()

    def _request(self) -> ClipRequest:
        """What the options say of every clip."""
        names = {field.name for field in dataclasses.fields(ClipRequest)} - {"prompt", "model"}
        wishes: dict[str, Any] = {name: value for name, value in given_options(self) if name in names}
        wishes |= self.model.wishes() | {"scores": self.scores.parse()}
        if self.seed == "random":
            wishes["seed"] = self.parallel.from_first(random_seed)
        wishes |= self.references.wishes()
        return ClipRequest("", **wishes)

    def _request_of(self, record: Record, clip: Path) -> ClipRequest:
        """What a record says, of files and a model that may be elsewhere now."""
        where = [value for name, value in given_options(self) if name in FILES]
        places = [path for value in where for path in split_paths(str(value))]
        request = request_of(record, find_files(record, places, clip))
        device, dtype = self.machine.device or own_device(record.device), self.machine.dtype or record.dtype
        return dataclasses.replace(request, **self.model.wishes(), device=device, dtype=dtype)

    def _locate(self, request: ClipRequest, record: Record | None) -> None:
        try:
            locate_model(request, download=self.model.download, ask=_ask_to_fetch, record=record)
        except OpenSoraError as error:
            if record is None or self.model.model is not None:
                raise
            raise OpenSoraError(f"{error}; --model says where the model is that made this clip") from error

    def _artist(self, requests: list[ClipRequest], paths: list[Path]) -> "Artist | None":
        if self.frames.text_to_image is None:
            return None
        from opensora.cli.first_images import Artist

        return Artist.find(self.frames.text_to_image, requests, paths, self.parallel, download=self.model.download)

    def _engine(self, request: ClipRequest, memory: MemoryOptions, record: Record | None) -> "Engine":
        from opensora.generation.engine import Engine

        quiet_libraries()
        engine = Engine.load(request, **memory.choices, record=record)
        self.parallel.set_up(engine.pipeline)
        return engine

    def _say_what_is_made(self, clips: "list[PreparedClip]", kind: str) -> str:
        """Says what may be otherwise than the user expects; returns the size of the clips, which is the same for all.

        Raises:
            OpenSoraError: a file of that kind cannot hold it.
        """
        sampling, num_frames = clips[0].sampling, clips[0].num_frames
        check_fps(sampling.file_fps, kind)
        check_size(kind, num_frames, sampling.height, sampling.width)
        size = describe_size(VideoSize(num_frames, sampling.height, sampling.width), sampling.nominal_size)
        if self.size.names_a_size:
            say(f"making {size}")
        notes = [note for clip in clips for note in clip.notes]
        if timing := timing_note(sampling.file_fps, kind):
            notes.append(timing)
        for note in dict.fromkeys(notes):
            say(f"note: {note}")
        return size


def _ask_to_fetch(missing: str) -> bool:
    """Whether a user at a terminal wants what is missing fetched.

    Raises:
        OpenSoraError: nobody is there to be asked.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise OpenSoraError(missing)
    print(f"{missing}\nFetch now? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
