"""How strongly which latent channels of a clip are guided: what a request says, completed by the model's defaults."""

from typing import TYPE_CHECKING, Any

from opensora.errors import OpenSoraError
from opensora.generation.record import Sampling
from opensora.generation.request import ClipRequest, parse_cfg_channels
from opensora.models.channel_scales import resolve_channel_scales
from opensora.models.guidance_strength import equivalent_scale
from opensora.models.guiders import make_guider

if TYPE_CHECKING:
    from opensora.pipeline import OpenSoraPipeline


def resolve_guidance(pipe: "OpenSoraPipeline", request: ClipRequest) -> dict[str, Any]:
    """The guidance asked for, as fields of `record.Sampling`; channels of equal strength are the settings they come to.

    Args:
        pipe: with the sampler of the request.
        request: checked already.

    Raises:
        OpenSoraError: channels that the latent does not have, or that are no others than those guided already.
    """
    asked = _as_asked(pipe, request)
    if request.guider is not None:
        make_guider(request.guider, scale=1.0)  # refuses options that it does not have
        asked["image_guidance_scale"] = None
    if request.channel_scales is not None:
        scales = resolve_channel_scales(request.channel_scales, pipe.autoencoder.latent_channels)
        return asked | {"guidance_scale": None, "cfg_channels": None, "channel_scales": list(scales)}
    if request.equivalent_to is None:
        return asked
    if pipe.transformer.reads_guidance:
        raise OpenSoraError(
            "guidance is distilled into this model's transformer, whatever channels are guided; leave out "
            "`equivalent_to`"
        )
    before = _channels(pipe, asked["cfg_channels"], "cfg_channels")
    after = _channels(pipe, request.equivalent_to, "equivalent_to")
    if before == after:
        raise OpenSoraError("`equivalent_to` has no effect: these channels are guided already; leave it out")
    total = pipe.autoencoder.latent_channels

    def equivalent(scale: float | None) -> float | None:
        return None if scale is None else equivalent_scale(scale, guided=len(before), channels=total, to=len(after))

    scales = {name: equivalent(asked[name]) for name in ("guidance_scale", "image_guidance_scale")}
    return {**scales, "cfg_channels": parse_cfg_channels(request.equivalent_to, "equivalent_to")}


def pipeline_guidance(sampling: Sampling) -> dict[str, Any]:
    """How a clip is guided, in keywords of a call of the pipeline."""
    guidance = sampling.guidance
    if sampling.guider is None:
        return {**guidance, "image_guidance_scale": sampling.image_guidance_scale}
    scale = guidance.pop("guidance_scale", None)  # scales of channels take the place of the guider's own
    return {**guidance, "guider": make_guider(sampling.guider, 1.0 if scale is None else scale)}


def equal_strength_note(pipe: "OpenSoraPipeline", request: ClipRequest) -> list[str]:
    """`guidance 7 on 3 of 4 channels = 5.5 on all 4`, if channels of equal strength were asked for; a line or none."""
    if request.equivalent_to is None:
        return []
    asked, made, total = _as_asked(pipe, request), resolve_guidance(pipe, request), pipe.autoencoder.latent_channels
    before, after = (len(_channels(pipe, said["cfg_channels"], "cfg_channels")) for said in (asked, made))
    was = f"all {total}" if before == total else f"{before} of {total}"
    now = f"all {total}" if after == total else f"{after}"
    note = f"guidance {asked['guidance_scale']:g} on {was} channels = {made['guidance_scale']:g} on {now}"
    if asked["image_guidance_scale"] is not None and request.shows_frames:
        note += f", image guidance {asked['image_guidance_scale']:g} = {made['image_guidance_scale']:g}"
    return [note]


def few_steps_note(pipe: "OpenSoraPipeline", sampling: Sampling) -> list[str]:
    """That a model which learnt to be sampled in few steps is asked for something else; a line or none."""
    distilled = pipe.config.distilled_from
    if not distilled:
        return []
    steps, made_for = sampling.num_inference_steps, distilled["num_steps"]
    asked = [] if steps == made_for else [f"{steps} steps"]
    asked += ["guidance"] if sampling.is_guided else []
    if not asked:
        return []
    return [
        f"this model was distilled to be sampled in {made_for} steps without guidance; it is asked for "
        f"{' and '.join(asked)}, which it did not learn"
    ]


def _as_asked(pipe: "OpenSoraPipeline", request: ClipRequest) -> dict[str, Any]:
    """What the request says of scales and channels, or the model."""
    config, channels = pipe.config, request.cfg_channels
    own: dict[str, Any] = {
        "guidance_scale": config.guidance_scale,
        "image_guidance_scale": (config.guidance_options or {}).get("image_guidance_scale"),
        "cfg_channels": pipe.default_cfg_channels,
    }
    said: dict[str, Any] = {
        "guidance_scale": request.guidance_scale,
        "image_guidance_scale": request.image_guidance_scale,
    }
    chosen = {} if channels == "default" else {"cfg_channels": parse_cfg_channels(channels)}
    return own | {name: scale for name, scale in said.items() if scale is not None} | chosen


def _channels(pipe: "OpenSoraPipeline", channels: Any, name: str) -> tuple[int, ...]:
    from opensora.models.guidance import resolve_cfg_channels  # which needs torch

    parsed: Any = parse_cfg_channels(channels, name)
    return resolve_cfg_channels(parsed, pipe.autoencoder.latent_channels, f"`{name}`")
