"""The choices that make a clip of `opensora generate` fit into a given memory."""

import dataclasses

from opensora.cli.generate_options import MachineOptions, MemoryOptions
from opensora.cli.options import flag, given_options, with_flags
from opensora.cli.progress import say
from opensora.errors import OpenSoraError
from opensora.generation.request import ClipRequest


def fitted(request: ClipRequest, memory: MemoryOptions) -> tuple[str | None, MemoryOptions]:
    """The precision and the choices with which a clip fits into `max_memory`, and says them.

    Raises:
        OpenSoraError: it does not fit whatever is chosen, choices were made already, or only a file tells its length.
    """
    from opensora.checkpoints.loading import choose_device
    from opensora.planning.devices import parse_memory
    from opensora.planning.report import choices_in_words, gigabytes, verdict_of
    from opensora.planning.request import plan_request

    assert memory.max_memory is not None
    made = [name for name, _ in given_options(memory) if name != "max_memory"]
    if made:
        raise OpenSoraError(f"--max-memory chooses what makes a clip fit; leave out {flag(made[0])}")
    if request.edit is not None:
        raise OpenSoraError("--max-memory cannot tell how long an edited clip is; see opensora plan --num-frames N")
    memory_bytes = parse_memory(memory.max_memory, "max_memory")
    device = choose_device(request.device).type
    plan = plan_request(request, device=device, memory_bytes=memory_bytes, known_frames=request.shows_frames)
    if not plan["fits"]:
        raise OpenSoraError(with_flags(verdict_of(plan), MachineOptions(), memory))
    choices, needed = dict(plan["with"]["choices"]), gigabytes(plan["with"]["needed_bytes"])
    how = with_flags(choices_in_words(choices), MachineOptions(), memory) or "as it is"
    say(f"to fit into {gigabytes(memory_bytes)}: {how} ({needed} predicted)")
    dtype = choices.pop("dtype", request.dtype)
    return dtype, dataclasses.replace(memory, max_memory=None, **choices)
