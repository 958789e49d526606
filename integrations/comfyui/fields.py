"""What widgets say, as fields of a clip's request: of a `ClipRequest` on this machine, of JSON for a server.

A widget always has a value; one that stands for "as the model likes it best" is left out of the request.
"""

from typing import Any

from comfy_api.latest import io

Guidance = io.Custom("OPENSORA_GUIDANCE")
"""A dict of fields."""

MODELS_OWN = "model's own"
MOST_SEED = 2**63 - 1


def clip_inputs() -> list[io.Input]:
    """Widgets of a clip: its size, how many steps, and the seed of its noise."""
    return [
        io.Int.Input(
            "seed",
            default=42,
            min=0,
            max=MOST_SEED,
            control_after_generate=True,
            tooltip="Of the noise; the command line's clip of the same seed has the same frames.",
        ),
        io.Int.Input("steps", default=0, min=0, max=1000, tooltip="Of the sampler; 0 for the model's own number."),
        io.String.Input(
            "num_frames", default="", placeholder=MODELS_OWN, tooltip='A number ("51") or a duration ("4s", "2x").'
        ),
        io.String.Input("resolution", default="", placeholder=MODELS_OWN, tooltip='Such as "240p", "256px".'),
        io.String.Input("aspect_ratio", default="", placeholder=MODELS_OWN, tooltip='Such as "16:9".'),
        io.Int.Input("width", default=0, min=0, max=8192, tooltip="In pixels, with `height`; 0 for the model's own."),
        io.Int.Input("height", default=0, min=0, max=8192, tooltip="In pixels, with `width`; 0 for the model's own."),
    ]


def clip_fields(
    *, seed: int, steps: int, num_frames: str, resolution: str, aspect_ratio: str, width: int, height: int
) -> dict[str, Any]:
    """Fields of `clip_inputs`."""
    told: dict[str, Any] = {
        "num_inference_steps": steps,
        "num_frames": num_frames.strip(),
        "resolution": resolution.strip(),
        "aspect_ratio": aspect_ratio.strip(),
        "width": width,
        "height": height,
    }
    return {"seed": seed, **{name: value for name, value in told.items() if value}}


class OpenSoraGuidance(io.ComfyNode):
    """Says how strongly each latent channel follows the text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OpenSoraGuidance",
            display_name="Open-Sora Channel Guidance",
            category="Open-Sora",
            description="Which latent channels are guided, and how strongly.",
            inputs=[
                io.Float.Input(
                    "guidance_scale",
                    default=-1.0,
                    min=-1.0,
                    max=100.0,
                    step=0.1,
                    tooltip="1 is none; below 0 stands for the model's own.",
                ),
                io.String.Input(
                    "cfg_channels",
                    default="default",
                    tooltip='Channels that are guided: the first k ("3"), indices ("0,2"), "all", or "default".',
                ),
                io.String.Input(
                    "channel_scales",
                    default="",
                    placeholder="0-2:7,3:1",
                    tooltip="In place of both: a scale for each channel.",
                ),
                io.String.Input(
                    "equivalent_to",
                    default="",
                    tooltip="Channels whose guidance is matched in strength, written as `cfg_channels`.",
                    advanced=True,
                ),
            ],
            outputs=[Guidance.Output(display_name="guidance")],
        )

    @classmethod
    def execute(
        cls, guidance_scale: float, cfg_channels: str, channel_scales: str, equivalent_to: str
    ) -> io.NodeOutput:
        fields: dict[str, Any] = {} if guidance_scale < 0 else {"guidance_scale": guidance_scale}
        if cfg_channels.strip() not in ("", "default"):
            fields["cfg_channels"] = cfg_channels.strip()
        for name, value in (("channel_scales", channel_scales), ("equivalent_to", equivalent_to)):
            if value.strip():
                fields[name] = value.strip()
        return io.NodeOutput(fields)
