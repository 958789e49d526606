"""Work spread over several processes of this machine, each with what it has loaded, and ended with this one.

A worker holds nothing but a pipe to this process: if this process is killed, the pipe closes, and the worker ends.
"""

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

from opensora.errors import OpenSoraError

Task = TypeVar("Task")
Result = TypeVar("Result")
Start = Callable[[], Callable[[Task], Result]]
"""Called once in each process: loads what the work needs, and returns what does it."""


def results_of(start: "Start[Task, Result]", tasks: Iterable[Task], num_workers: int) -> Iterator[Result]:
    """Results as they are done: in order from one worker, in any order from several.

    Args:
        start: importable from other processes.
        tasks: are handed out in order, one at a time.
        num_workers: processes; 1 works in this one.

    Raises:
        OpenSoraError: what the work raised, or a worker that died.
    """
    if num_workers == 1:
        work = start()
        for task in tasks:
            yield work(task)
        return
    yield from _of_processes(start, tasks, num_workers)


def _of_processes(start: "Start[Task, Result]", tasks: Iterable[Task], num_workers: int) -> Iterator[Result]:
    context = multiprocessing.get_context("spawn")
    waiting = iter(tasks)
    threads = max(1, len(os.sched_getaffinity(0)) // num_workers) if hasattr(os, "sched_getaffinity") else 1
    workers: dict[Connection, SpawnProcess] = {}
    try:
        for _ in range(num_workers):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, start, threads), daemon=True)
            with _without_interrupts():
                process.start()
            there.close()
            workers[here] = process
            _hand_out(here, waiting)
        while workers:
            for connection in wait(list(workers)):
                assert isinstance(connection, Connection)
                answer = _answer(connection)
                if answer is None:
                    workers.pop(connection).join()
                    continue
                yield answer
                _hand_out(connection, waiting)
    finally:
        for connection, process in workers.items():
            process.terminate()
            process.join()
            connection.close()


def _hand_out(connection: Connection, waiting: Iterator[Task]) -> None:
    """The next task, or the word that there is none."""
    with contextlib.suppress(BrokenPipeError):  # told by what it answers, or by its silence
        connection.send(next(waiting, None))


def _answer(connection: Connection) -> Any:
    """A result; None from a worker that is done.

    Raises:
        OpenSoraError: what it raised, or that it is gone.
    """
    try:
        kind, value = connection.recv()
    except (EOFError, ConnectionResetError):
        raise OpenSoraError(
            "a worker process was ended from outside, perhaps for memory; give fewer `workers`"
        ) from None
    if kind == "mistake":
        raise OpenSoraError(value)
    if kind == "error":
        raise RuntimeError(f"a worker process failed:\n{value}")
    return value


def _serve(connection: Connection, start: "Start[Task, Result]", threads: int) -> None:
    """What a worker does until there is no task, or nobody to give one."""
    import torch

    torch.set_num_threads(threads)
    try:
        work = start()
        while (task := connection.recv()) is not None:
            connection.send(("result", work(task)))
        connection.send(("result", None))
    except OpenSoraError as error:
        connection.send(("mistake", str(error)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    except BaseException:
        with contextlib.suppress(OSError):
            connection.send(("error", traceback.format_exc()))


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """A process that is started within ignores Ctrl-C, which this one hears for all."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not in the main thread, which alone hears
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
