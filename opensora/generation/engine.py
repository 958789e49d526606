"""From a request to a clip: what every front end calls.

    engine = Engine.load(ClipRequest("", model="opensora-1.2"))
    engine.generate(ClipRequest("a red ball rolls left", num_frames="4s")).save("ball.mp4")

An engine may be called from several threads at once: all state of a clip lives in the call. A program that must not
wait runs it in a thread (`await asyncio.to_thread(engine.generate, request, cancelled=stop.is_set)`).
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from opensora.errors import OpenSoraError
from opensora.generation.clip import Clip, to_uint8
from opensora.generation.fast import with_forecast
from opensora.generation.guidance import equal_strength_note, few_steps_note
from opensora.generation.inputs import (
    InputFiles,
    edited_length,
    frames_of_loops,
    notes_on_files,
    placed_by_type,
)
from opensora.generation.loading import LoadedModel, load_model
from opensora.generation.loops import still_frames
from opensora.generation.prepared import (
    EncodedText,
    PreparedClip,
    SampledClip,
    check_one_batch,
    memory_in_words,
    sample_batch,
    sample_latents,
)
from opensora.generation.progress import Progress, Watch
from opensora.generation.record import NamedFrames, PlacedReferences, Record, versions
from opensora.generation.request import OF_THE_MODEL, ClipRequest
from opensora.generation.resolve import check_effects, resolve, total_frames
from opensora.generation.words import check_words
from opensora.models.autoencoders.tiles import TiledCodec
from opensora.models.text.condition_types import former_name

if TYPE_CHECKING:
    from opensora.conditioning.frames import FrameConditioning
    from opensora.offloading import Offload
    from opensora.pipeline import OpenSoraPipeline


class Engine:
    """Makes clips with one model.

    Args:
        pipeline: makes them; nobody else changes it meanwhile.
        model: what records say of the model; None for a pipeline that the caller put together, of whose clips no record
            is kept.
        loaded_for: the request that the model was loaded for.
        allows_idle: requests may ask for what has no effect, as records do, and the cells of a grid.
    """

    def __init__(
        self,
        pipeline: "OpenSoraPipeline",
        model: LoadedModel | None = None,
        loaded_for: ClipRequest | None = None,
        allows_idle: bool = False,
    ) -> None:
        self.pipeline, self.model, self._loaded_for, self._allows_idle = pipeline, model, loaded_for, allows_idle

    @classmethod
    def load(
        cls,
        request: ClipRequest,
        *,
        offload: "Offload | bool | None" = None,
        sequential_guidance: bool = False,
        micro_batch_size: int | None = None,
        tile_frames: int | None = None,
        record: Record | None = None,
        allows_idle: bool = False,
    ) -> "Engine":
        """An engine for requests of one model.

        Args:
            request: names what is `request.OF_THE_MODEL`; what this machine lacks of a published model is fetched by
                `loading.locate_model`.
            offload: what is in memory only while it works, see `load_pipeline`.
            sequential_guidance: the branches of guidance one after the other instead of at once.
            micro_batch_size: frames that the 2D autoencoder works on at once; None for its own choice.
            tile_frames: frames of a tile of an autoencoder that works in tiles; None for its own choice.
            record: of the clip that is made again; any other model or adapter is refused.
            allows_idle: requests may ask for what has no effect.

        Raises:
            OpenSoraError: no such model, missing or damaged files, or an absent device.
        """
        if micro_batch_size is not None and micro_batch_size < 1:
            raise OpenSoraError(f"`micro_batch_size` is {micro_batch_size}, expected 1 or more")
        pipeline, model = load_model(request, offload=offload, record=record)
        pipeline.sequential_guidance = sequential_guidance
        if micro_batch_size is not None:
            pipeline.autoencoder.micro_batch_size = micro_batch_size
        if tile_frames is not None:
            if not isinstance(pipeline.autoencoder, TiledCodec):
                raise OpenSoraError(
                    "`tile_frames` is for autoencoders that work in tiles, those of Open-Sora 2.0; give "
                    "`micro_batch_size` instead"
                )
            pipeline.autoencoder.enable_tiling(tile_sample_frames=tile_frames)
        return cls(pipeline, model, request, allows_idle=allows_idle or record is not None)

    def generate(
        self,
        request: ClipRequest,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Clip:
        """Makes one clip.

        Args:
            request: what to make.
            on_progress: called in this thread whenever a stage begins or a step is done.
            cancelled: asked in this thread between all steps; true stops the work.

        Raises:
            OpenSoraError: wishes that contradict each other, or that this model cannot grant.
            Cancelled: `cancelled` said so.
        """
        return self.make(self.prepare([request])[0], on_progress=on_progress, cancelled=cancelled)

    def prepare(self, requests: Sequence[ClipRequest], files: InputFiles | None = None) -> list[PreparedClip]:
        """Checks and completes requests, reads and encodes the files that they name; each is encoded once.

        Args:
            requests: of clips that will be made.
            files: that were read already.

        Raises:
            OpenSoraError: the first that cannot be granted.
        """
        files = files or InputFiles()
        requests = [request.separated() for request in requests]
        for request in requests:
            self._check_same_model(request)
            request.check()
        texts = [text for request in requests for text in request.texts()]
        texts += [request.negative_prompt for request in requests if request.negative_prompt]
        check_words(self.pipeline, texts)
        encoded: dict[Any, list[FrameConditioning | None]] = {}
        prepared = []
        for request in requests:
            pipeline = self._pipeline(request)
            inputs = files.read(request)
            if isinstance(inputs, PlacedReferences) and inputs.alignment is None:
                inputs = replace(inputs, alignment=pipeline.config.frame_alignment)
            edit = inputs.edit if isinstance(inputs, NamedFrames) else None
            sampling = resolve(pipeline, request, edited_length(files[edit], request) if edit else None)
            if isinstance(inputs, PlacedReferences) and request.cond_type is not None:
                inputs = placed_by_type(pipeline, inputs, files, request, sampling)
            if not self._allows_idle:
                check_effects(request, sampling, sequential_guidance=pipeline.sequential_guidance)
            sampling, unfit = with_forecast(pipeline, request, sampling, self.model)
            num_frames = total_frames(pipeline, sampling)  # refuses frames to be carried over that are too many
            rates = (sampling.input_fps, sampling.file_fps)
            key = (inputs, sampling.size, sampling.num_loops, sampling.condition_frames, *rates)
            if key not in encoded:
                with pipeline.on_device("autoencoder"):
                    encoded[key] = frames_of_loops(pipeline, inputs, files, sampling)
            num_frames -= sum(still_frames(pipeline, sampling.size, encoded[key]))
            texts, negatives = request.texts(), [request.negative_prompt] if request.negative_prompt else []
            notes = [*former_name(request.cond_type), *pipeline.text_notes(texts, negatives, sampling.scores)]
            notes += [*equal_strength_note(pipeline, request), *few_steps_note(pipeline, sampling)]
            notes += unfit
            notes += notes_on_files(inputs, files, sampling)
            spelled = pipeline.spell(texts, sampling.scores)
            negative = next(iter(pipeline.spell_negative(negatives)), None)
            clip = PreparedClip(
                pipeline, request, sampling, num_frames, inputs, encoded[key], tuple(spelled), negative, tuple(notes)
            )
            prepared.append(clip)
        return prepared

    def make(
        self,
        prepared: PreparedClip,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Clip:
        """As `generate`, for a request that is prepared."""
        return self.make_batch([prepared], on_progress=on_progress, cancelled=cancelled)[0]

    def make_batch(
        self,
        prepared: Sequence[PreparedClip],
        *,
        on_progress: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> list[Clip]:
        """Several clips at once, of the same settings, without frame conditioning: quicker where clips are small.

        A clip differs from the one that is made alone by no more than rounding.

        Args:
            prepared: one or more, of this engine.
            on_progress, cancelled: as in `generate`.

        Raises:
            OpenSoraError: clips that cannot share a batch.
        """
        sampling = prepared[0].sampling
        check_one_batch(prepared)
        watch = Watch(sampling.num_loops, on_progress, cancelled)
        with memory_in_words(sampling):
            output = sample_batch(prepared, watch)
        watch.check()
        counted = (output.num_evaluations // len(prepared), output.num_forecast // len(prepared))
        return [
            Clip(to_uint8(frames), sampling.file_fps, self._record(clip, output.settings), *counted)
            for frames, clip in zip(output.frames, prepared, strict=True)
        ]

    # --- stage by stage, for front ends that show text and latents as things of their own; together they are `make` ---

    def encode_text(self, prepared: PreparedClip) -> EncodedText:
        """The text of a prepared clip, and of every other one that is spelled alike."""
        request = prepared.request
        negatives = [request.negative_prompt] if request.negative_prompt else None
        states, negative_states = prepared.pipeline.encode_prompt(
            request.texts(), negatives, scores=prepared.sampling.scores
        )
        return EncodedText(prepared.spelled, prepared.spelled_negative, states, negative_states)

    def sample(
        self,
        prepared: PreparedClip,
        text: EncodedText,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> SampledClip:
        """The latents of a clip of one loop; each loop of a long video begins with decoded frames of the one before.

        Args:
            prepared: of this engine.
            text: of this clip, or of one that is spelled alike.
            on_progress, cancelled: as in `generate`.

        Raises:
            OpenSoraError: several loops, or the text of another clip.
        """
        sampling = prepared.sampling
        if sampling.num_loops > 1:
            raise OpenSoraError(f"`loop` is {sampling.num_loops}, but a long video cannot be made stage by stage")
        encoded, spelled = ((t.spelled, t.spelled_negative) for t in (text, prepared))
        if encoded != spelled:
            raise OpenSoraError(
                f"the text is of a clip spelled {encoded}, this clip is spelled {spelled}; encode its own"
            )
        watch = Watch(1, on_progress, cancelled)
        with memory_in_words(sampling):
            output = sample_latents(prepared, text, watch)
        watch.check()
        return SampledClip(prepared, output)

    def decode(self, sampled: SampledClip) -> Clip:
        """The clip of latents that this engine sampled."""
        prepared, output = sampled.prepared, sampled.output
        pipeline, sampling = prepared.pipeline, prepared.sampling
        with memory_in_words(sampling):
            frames = pipeline.decode(output.frames, sampling.size.num_frames)[0]
        head, tail = still_frames(pipeline, sampling.size, prepared.conditioning)
        frames, record = to_uint8(frames[head : len(frames) - tail]), self._record(prepared, output.settings)
        return Clip(frames, sampling.file_fps, record, output.num_evaluations, output.num_forecast)

    # --- within -------------------------------------------------------------------------------------------------------

    def _pipeline(self, request: ClipRequest) -> "OpenSoraPipeline":
        """The pipeline that samples as asked for: the same networks, and a scheduler that nobody else uses."""
        if request.sampler is None and request.time_shift is None:
            return self.pipeline
        pipeline = copy.copy(self.pipeline)
        if request.sampler is not None:
            pipeline.use_sampler(request.sampler)
        if request.time_shift is not None:
            pipeline.use_time_shift(request.time_shift)
        return pipeline

    def _check_same_model(self, request: ClipRequest) -> None:
        """A request may leave the model out, or must ask for the one that is loaded."""
        defaults = {field.name: getattr(ClipRequest(""), field.name) for field in fields(ClipRequest)}
        for name in OF_THE_MODEL:
            asked, loaded = getattr(request, name), getattr(self._loaded_for or ClipRequest(""), name)
            if asked != defaults[name] and asked != loaded:
                raise OpenSoraError(
                    f"`{name}` is {asked!r}, but this engine was loaded with {loaded!r}; leave it out, or load another"
                )

    def _record(self, prepared: PreparedClip, settings: dict[str, Any]) -> Record | None:
        if self.model is None:
            return None
        request = prepared.request
        return Record(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            seed=request.seed,
            model=self.model.name,
            model_hash=self.model.sha256,
            sampling=prepared.sampling,
            device=str(self.pipeline.device),
            dtype=settings["dtype"],
            pipeline={
                **{name: settings.get(name) for name in ("scheduler", "guider", "latent_space")},
                **({"distilled_from": settings["distilled_from"]} if "distilled_from" in settings else {}),
            },
            versions=versions(),
            refined_prompt=request.refined_prompt,
            spelled_prompt=prepared.spelled,
            spelled_negative_prompt=prepared.spelled_negative,
            notes=prepared.notes,
            given=prepared.inputs,
            components=self.model.components,
            adapters=self.model.adapters,
            image_origin=request.image_origin,
        )
