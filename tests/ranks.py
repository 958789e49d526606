"""Runs a function in several processes that form one gloo process group.

    def sum_of_ranks(offset):
        total = torch.tensor(float(dist.get_rank() + offset))
        dist.all_reduce(total)
        return total

    assert run_ranks(2, sum_of_ranks, 10) == [21, 21]

The function stands at the top of a test module or of one beside this; it finds `torch.distributed` initialised.
What it takes and returns is pickled. Processes are forked from a server that has imported what is heavy, so that a call
costs a tenth of a second and not two.
"""

import importlib.util
import multiprocessing
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch.distributed.fsdp", "opensora.training.trainer", "opensora.models.stdit3"])


def run_ranks(num_ranks: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120) -> list[Any]:
    """What `function(*args)` returns on each of the ranks, in order.

    Raises:
        AssertionError: a rank raised (its traceback is the message), died, or was not done in time; the others are
            ended.
    """
    module = sys.modules[function.__module__]
    call = (module.__name__, module.__file__, function.__qualname__, pickle.dumps(args))
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(num_ranks):
            receiver, sender = SERVER.Pipe(duplex=False)
            process = SERVER.Process(
                target=_run_rank, args=(rank, num_ranks, f"{folder}/store", timeout_s, call, sender)
            )
            process.start()
            sender.close()  # so that a rank that dies closes the pipe
            ranks.append((process, receiver))
        try:
            return _collect([receiver for _, receiver in ranks], timeout_s)
        finally:
            for process, receiver in ranks:
                process.kill()
                process.join()
                receiver.close()


def _collect(receivers: list[Any], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    end = time.monotonic() + timeout_s
    while len(results) < len(receivers):
        waiting = [receiver for rank, receiver in enumerate(receivers) if rank not in results]
        ready = wait(waiting, timeout=end - time.monotonic())
        assert ready, f"ranks {sorted(set(range(len(receivers))) - set(results))} were not done after {timeout_s} s"
        for receiver in ready:
            rank = receivers.index(receiver)
            try:
                succeeded, value = receiver.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} died") from None
            assert succeeded, f"rank {rank} raised\n{value}"
            results[rank] = pickle.loads(value)
    return [results[rank] for rank in range(len(receivers))]


def _run_rank(
    rank: int, num_ranks: int, store: str, timeout_s: float, call: tuple[str, str, str, bytes], sender: Any
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", f"file://{store}", rank=rank, world_size=num_ranks, timeout=timedelta(seconds=timeout_s)
        )
        name, file, qualname, args = call
        function = _load_module(name, Path(file))
        for part in qualname.split("."):
            function = getattr(function, part)
        result = function(*pickle.loads(args))
        dist.barrier()  # nobody leaves while others still talk
        sender.send((True, pickle.dumps(result)))
    except BaseException:
        sender.send((False, traceback.format_exc()))
    finally:
        sender.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def _load_module(name: str, file: Path) -> Any:
    """The module under the name that it has in the test run, so that its classes unpickle; imported only once."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
