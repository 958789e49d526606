"""Several processes that do one thing together, as `torchrun` starts them: who speaks, and which share a clip."""

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TypeVar

from opensora.cli.main import EXIT_INTERRUPTED, EXIT_USER_ERROR
from opensora.cli.options import FLAG, option
from opensora.errors import OpenSoraError, Terminated

if TYPE_CHECKING:
    from opensora.distributed.mesh import Launch
    from opensora.pipeline import OpenSoraPipeline

T = TypeVar("T")


@dataclass(frozen=True)
class ParallelOptions:
    """For torchrun --nproc-per-node N -m opensora.cli.main generate ...: how N processes share each clip."""

    sequence_parallel: Annotated[int | None, option("N", "all, or half or a third with --parallel-guidance")] = None
    """Processes that share a clip's tokens."""
    parallel_guidance: Annotated[bool, FLAG] = False
    """The branches of guidance on two processes, or two groups of them; 1.3 and 2.0 may have three."""

    def check(self, *, device: str | None, sequential_guidance: bool) -> None:
        """Raises `OpenSoraError` for options that exclude each other."""
        if self.parallel_guidance and sequential_guidance:
            raise OpenSoraError("--parallel-guidance and --sequential-guidance exclude each other; give one of them")
        if started_by_torchrun() and device is not None and ":" in device:
            kind = device.split(":")[0]
            raise OpenSoraError(f"--device {device} is one for all processes; --device {kind} gives each its own")

    @contextlib.contextmanager
    def joined(self) -> Iterator[bool]:
        """Whether this process speaks and writes for all; alone it does. The others are silent within.

        Raises:
            OpenSoraError: as many processes as were started cannot share a clip as was asked for.
        """
        alone = not started_by_torchrun()
        if alone and self.sequence_parallel is None and not self.parallel_guidance:
            yield True  # without torch: a mistake in the input should not wait for its import
            return
        from opensora.distributed.mesh import launched
        from opensora.distributed.sampling import sequence_ranks

        with launched() as launch, speaking_once(launch), contextlib.ExitStack() as silence:
            if launch.rank > 0:
                silence.enter_context(contextlib.redirect_stdout(io.StringIO()))
                silence.enter_context(contextlib.redirect_stderr(io.StringIO()))
            sequence_ranks(launch.num_ranks, guidance=self.parallel_guidance, sequence=self.sequence_parallel)
            yield launch.rank == 0

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first process, for all of them; without torch where there is one alone."""
        if not started_by_torchrun():
            return make()
        from opensora.distributed.mesh import from_first

        return from_first(make)

    def set_up(self, pipe: "OpenSoraPipeline") -> None:
        """Makes the pipeline work so."""
        if started_by_torchrun():
            pipe.parallelize(guidance=self.parallel_guidance, sequence=self.sequence_parallel)


@contextlib.contextmanager
def speaking_once(launch: "Launch") -> Iterator[None]:
    """Of the ranks that end for the same reason one tells it, and none that end because another did tell theirs.

    Raises:
        SystemExit: with the exit code that the first one has, on the others.
    """
    try:
        yield
    except (OpenSoraError, KeyboardInterrupt) as reason:
        if launch.is_first_to_say(str(reason)):
            raise
        if isinstance(reason, Terminated):
            raise SystemExit(128 + reason.number) from None
        raise SystemExit(EXIT_USER_ERROR if isinstance(reason, OpenSoraError) else EXIT_INTERRUPTED) from None
    except Exception:
        if launch.has_heard():  # a rank that is gone breaks what the others do together
            raise SystemExit(EXIT_USER_ERROR) from None
        raise


def own_device(recorded: str | None) -> str | None:
    """Where a clip was made; of several processes each takes a device of that kind for itself."""
    return recorded.split(":")[0] if recorded and started_by_torchrun() else recorded


def started_by_torchrun() -> bool:
    """What `torch.distributed.is_torchelastic_launched` tells, without torch."""
    return "TORCHELASTIC_RUN_ID" in os.environ
