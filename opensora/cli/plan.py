"""`opensora plan`: how much memory a clip will take, and what makes it fit, before anything is loaded or downloaded."""

import json
import re
from dataclasses import dataclass, field
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, arg

from opensora.cli.generate_options import MachineOptions, ModelOptions, SizeOptions
from opensora.cli.options import FLAG, flag, given_options, option
from opensora.errors import OpenSoraError
from opensora.generation.request import ClipRequest
from opensora.generation.resolve import describe_size, resolve_size

_UNITS = {"": 2**30, "GB": 2**30, "GIB": 2**30, "G": 2**30, "MB": 2**20, "MIB": 2**20, "M": 2**20}


@dataclass(frozen=True)
class Plan:
    """Predict the memory that `opensora generate` will take with the same options, and say what makes it fit.

    Configurations are read, weights are not: a published model need not be on this machine, and a file of weights is
    completed by the published model it fits. GB are 1024^3 bytes.
    """

    model: OmitArgPrefixes[Annotated[ModelOptions, arg(name="model")]] = field(default_factory=ModelOptions)
    size: OmitArgPrefixes[Annotated[SizeOptions, arg(name="size")]] = field(default_factory=SizeOptions)
    guidance_scale: Annotated[float | None, option("S", "the model's")] = None
    """How strongly the prompt is followed; 1 switches guidance off, and with it one of the two branches."""
    machine: OmitArgPrefixes[Annotated[MachineOptions, arg(name="machine")]] = field(default_factory=MachineOptions)
    device_memory: Annotated[str | None, option("24GB")] = None
    """What the device has; one that is not in this machine is taken for an accelerator."""
    json: Annotated[bool, FLAG] = False
    """Print JSON, for programs."""

    def run(self) -> None:
        """Prints the plan."""
        self.request.check()
        if self.model.download:
            raise OpenSoraError("a plan needs no weights; leave out --download")
        memory_bytes = None if self.device_memory is None else parse_memory(self.device_memory)
        plan = _with_options(self._predict(self._device(), memory_bytes))
        print(json.dumps(plan, indent=2) if self.json else "\n".join(_lines(plan)))

    @property
    def request(self) -> ClipRequest:
        """A clip of this size; what it shows takes no memory."""
        wishes = dict(given_options(self.size)) | dict(given_options(self.machine)) | self.model.wishes()
        return ClipRequest("a clip", guidance_scale=self.guidance_scale, **wishes)

    def _predict(self, device: str, memory_bytes: int | None) -> dict[str, Any]:
        import torch

        from opensora.geometry import VideoSize
        from opensora.planning.outline import outline
        from opensora.planning.report import plan_clip
        from opensora.planning.stages import Clip
        from opensora.planning.tracing import Tracer

        tracer, request = Tracer(), self.request
        outlined = outline(tracer, request.model_name, request.components)
        config = outlined.pipeline.config
        made = resolve_size(request, config, outlined.pipeline.size_rule())
        scale = config.guidance_scale if request.guidance_scale is None else request.guidance_scale
        clip = Clip(VideoSize(made.num_frames, made.height, made.width), guided=scale != 1)
        dtype = None if request.dtype is None else getattr(torch, request.dtype)
        plan = plan_clip(tracer, outlined, clip, device=device, dtype=dtype, memory_bytes=memory_bytes)
        return {"model": plan["model"], "clip": describe_size(clip.size, made.nominal_size), **plan}

    def _device(self) -> str:
        """Where it will run; not checked, for a plan may be made elsewhere."""
        if self.machine.device is None and self.device_memory is not None:
            return "accelerator"
        if self.machine.device is None:
            from opensora.checkpoints.loading import choose_device

            return choose_device(None).type
        return _device_type(self.machine.device)


def _device_type(name: str) -> str:
    import torch

    try:
        return torch.device(name).type
    except RuntimeError as error:
        raise OpenSoraError(f"--device is {name!r}, expected a name such as cpu or cuda") from error


def parse_memory(text: str) -> int:
    """Bytes of `24GB`, `24` (GB), `7.5 GiB` or `16000MB`; all units are powers of 1024, as memory is sold.

    Raises:
        OpenSoraError: anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip(), re.IGNORECASE | re.ASCII)
    if not match or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise OpenSoraError(f"--device-memory is {text!r}, expected a size such as 24GB or 16000MB")
    return round(float(match[1]) * _UNITS[match[2].upper()])


def _with_options(plan: Any) -> Any:
    """The plan with choices as options of `opensora generate`."""
    if isinstance(plan, list):
        return [_with_options(part) for part in plan]
    if not isinstance(plan, dict):
        return plan
    said: dict[str, Any] = {}
    for name, value in plan.items():
        if name == "choices":
            words = [(flag(choice), None if chosen is True else str(chosen)) for choice, chosen in value.items()]
            said["options"] = [word for both in words for word in both if word is not None]
        else:
            said[name] = _with_options(value)
    return said


def _lines(plan: dict[str, Any]) -> list[str]:
    """The plan on one screen."""
    from opensora.planning.report import gigabytes

    where = "on the CPU" if plan["device"] == "cpu" else f"on {_article(plan['device'])}"
    branches = "two branches of guidance" if plan["guided"] else "no guidance"
    lines = [f"{plan['model']}: {plan['clip']}", f"{branches}, {plan['dtype']} {where}; GB are 1024^3 bytes", ""]
    lines.append(f"{'stage':<9}{'network':<14}{'weights':>10}{'activations':>14}{'in small portions':>20}")
    for stage in plan["stages"]:
        sizes = (stage["weight_bytes"], stage["activation_bytes"], stage["activation_bytes_in_portions"])
        weights, activations, in_portions = (gigabytes(value) for value in sizes)
        network = stage["network"].replace("_", " ")
        lines.append(f"{stage['name']:<9}{network:<14}{weights:>10}{activations:>14}{in_portions:>20}")
    lines += ["", f"{'in all':>10}   options of generate (what the process itself takes is included)"]
    lines += [f"{gigabytes(way['needed_bytes']):>10}   {' '.join(way['options']) or 'none'}" for way in plan["ways"]]
    if "fits" not in plan:
        return lines
    memory = gigabytes(plan["device_memory_bytes"])
    if plan["fits"]:
        way = plan["with"]
        how = f"with {' '.join(way['options'])}" if way["options"] else "as it is"
        return [*lines, "", f"fits into {memory} {how}: {gigabytes(way['needed_bytes'])}"]
    options, too_large = " ".join(plan["smallest"]["options"]), plan["too_large"]
    needs = ", ".join(f"{name} still takes {gigabytes(size)}" for name, size in too_large.items())
    advice = "a smaller --text-encoder" if "text" in too_large else "fewer --num-frames or a smaller --resolution"
    return [*lines, "", f"does not fit into {memory}: with {options} {needs}; choose {advice}"]


def _article(device: str) -> str:
    return "an accelerator" if device == "accelerator" else device
