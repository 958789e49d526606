"""What a request for a clip will take: configurations are read, weights are not."""

from typing import Any

from opensora.checkpoints.precision import dtype_named
from opensora.generation.request import ClipRequest
from opensora.generation.resolve import describe_size, resolve
from opensora.planning.meta_pipeline import meta_pipeline
from opensora.planning.report import plan_clip
from opensora.planning.stages import Clip
from opensora.planning.tracing import Tracer


def plan_request(
    request: ClipRequest, *, device: str, memory_bytes: int | None = None, known_frames: bool = False
) -> dict[str, Any]:
    """The plan of a clip, see `report.plan_clip`.

    Args:
        request: model, size, guidance and precision.
        device: "cpu", or the kind of an accelerator.
        memory_bytes: what it has; None for a plan that asks for no verdict.
        known_frames: the clip is made from pictures or clips too.
    """
    tracer = Tracer()
    meta = meta_pipeline(tracer, request.model_name, request.components)
    sampling = resolve(meta.pipeline, request)
    conditioned = known_frames and meta.pipeline.transformer.reads_channels
    clip = Clip(sampling.size, guided=sampling.is_guided, conditioned=conditioned)
    dtype = None if request.dtype is None else dtype_named(request.dtype, on_cpu=device == "cpu")
    plan = plan_clip(tracer, meta, clip, device=device, dtype=dtype, memory_bytes=memory_bytes)
    return {**plan, "clip": describe_size(clip.size, sampling.nominal_size)}
