"""`opensora plan`: how much memory a clip will take, and what makes it fit, before anything is loaded or downloaded."""

import json
from dataclasses import dataclass, field
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, arg

from opensora.cli.generate_options import GuidanceOptions, MachineOptions, MemoryOptions, ModelOptions, SizeOptions
from opensora.cli.options import FLAG, given_options, option, with_flags
from opensora.errors import OpenSoraError
from opensora.generation.request import ClipRequest


@dataclass(frozen=True)
class Plan:
    """Predict the memory that `opensora generate` will take with the same options, and say what makes it fit.

    Configurations are read, weights are not: a published model need not be on this machine, and a file of weights is
    completed by the published model it fits. GB are 1024^3 bytes.
    """

    model: OmitArgPrefixes[Annotated[ModelOptions, arg(name="model")]] = field(default_factory=ModelOptions)
    size: OmitArgPrefixes[Annotated[SizeOptions, arg(name="size")]] = field(default_factory=SizeOptions)
    guidance: OmitArgPrefixes[Annotated[GuidanceOptions, arg(name="guidance")]] = field(default_factory=GuidanceOptions)
    known_frames: Annotated[bool, FLAG] = False
    """The clip is made from pictures or clips too; models that are shown them beside the noise guide by them."""
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
        from opensora.planning.devices import parse_memory

        memory_bytes = None if self.device_memory is None else parse_memory(self.device_memory)
        from opensora.planning.report import plan_lines
        from opensora.planning.request import plan_request

        device, known_frames = self._device(), self.known_frames
        plan = plan_request(self.request, device=device, memory_bytes=memory_bytes, known_frames=known_frames)
        if self.json:
            print(json.dumps(_with_options(plan), indent=2))
        else:
            print(with_flags("\n".join(plan_lines(plan)), self, MemoryOptions()))

    @property
    def request(self) -> ClipRequest:
        """A clip of this size; what it shows takes no memory."""
        groups = (self.size, self.guidance, self.machine)
        wishes = {name: value for group in groups for name, value in given_options(group)}
        return ClipRequest("a clip", **wishes, **self.model.wishes())

    def _device(self) -> str:
        """Where it will run; not checked, for a plan may be made elsewhere."""
        if self.machine.device is None and self.device_memory is not None:
            return "accelerator"
        if self.machine.device is None:
            from opensora.checkpoints.loading import choose_device

            return choose_device(None).type
        from opensora.planning.devices import device_kind

        return device_kind(self.machine.device)


def _with_options(plan: Any) -> Any:
    """The plan with choices as options of `opensora generate`."""
    if isinstance(plan, list):
        return [_with_options(part) for part in plan]
    if not isinstance(plan, dict):
        return plan
    if "choices" in plan:
        from opensora.planning.report import choices_in_words

        words = with_flags(choices_in_words(plan["choices"]), MachineOptions(), MemoryOptions()).split()
        plan = {"options": words} | {name: value for name, value in plan.items() if name != "choices"}
    return {name: _with_options(value) for name, value in plan.items()}
