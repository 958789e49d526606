"""Runs that are killed, stopped or run out of disk go on to the weights of the run that never was, to the bit."""

import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from ranks import SERVER, run_ranks
from tiny_regression import assert_equal_weights, final_weights, recipe

from opensora.distributed import checkpoint
from opensora.distributed.checkpoint import newest_checkpoint
from opensora.errors import OpenSoraError
from opensora.training.config import Recipe
from opensora.training.interrupts import stopping_between_steps
from opensora.training.trainer import Trainer

pytestmark = pytest.mark.multi

PLACES: dict[str, tuple[Any, str]] = {
    "before anything is written": (dcp, "save"),
    "before a file is filled": (safetensors.torch, "save"),
    "with a file written in part": (os, "fsync"),
    "with all files written": (checkpoint, "flush_folder"),
    "before the name is given": (Path, "rename"),
    "before old ones are removed": (checkpoint, "list_checkpoints"),
    "while an old one is removed": (shutil, "rmtree"),
}
"""Moments of a checkpoint's writing, by a function that is called then."""


def kill_in_second_checkpoint(place: str, folder: Path) -> None:
    """The process dies at the first call of the function after a checkpoint was written to its end."""
    owner, name = PLACES[place]
    original = getattr(owner, name)

    def dies(*args: Any, **kwargs: Any) -> Any:
        if list(folder.glob("checkpoints/step-*")):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, dies)


def run(recipe: Recipe, folder: Path, change: Callable[..., None] | None = None, *args: Any) -> None:
    """A run in a process of its own, which `change(*args)` may set a trap."""
    torch.set_num_threads(1)
    if change is not None:
        change(*args)
    trainer = Trainer(recipe, folder)
    with stopping_between_steps(trainer):
        trainer.run()


def process_of(*args: Any) -> Any:
    process = SERVER.Process(target=run, args=args)
    process.start()
    return process


def end_of(*args: Any) -> int:
    """The exit code of such a run."""
    process = process_of(*args)
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What the run ends with that nobody kills."""
    folder = tmp_path_factory.mktemp("whole")
    assert end_of(recipe(), folder) == 0
    return final_weights(folder)


@pytest.mark.parametrize("place", PLACES)
def test_killed_inside_a_checkpoint(tmp_path: Path, whole: dict[str, torch.Tensor], place: str) -> None:
    trap = (kill_in_second_checkpoint, place, tmp_path)
    assert end_of(recipe(keep_checkpoints=1), tmp_path, *trap) == -signal.SIGKILL
    path, damages = newest_checkpoint(tmp_path / "checkpoints")
    assert path is not None and not damages
    assert end_of(recipe(keep_checkpoints=1), tmp_path) == 0
    assert_equal_weights(final_weights(tmp_path), whole)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000012"]


@pytest.mark.slow
def test_killed_at_twenty_moments(tmp_path: Path) -> None:
    long = recipe(steps=80, checkpoint_every=1, critic=True)
    started = time.monotonic()
    assert end_of(long, tmp_path / "whole") == 0
    seconds = time.monotonic() - started
    rng, kills, runs = random.Random(0), 0, 0
    folder = tmp_path / "0"
    while kills < 20:
        process = process_of(long, folder)
        process.join(rng.uniform(0, 0.5 * seconds))
        process.kill()
        process.join()
        _, damages = newest_checkpoint(folder / "checkpoints")
        assert not damages
        if process.exitcode == 0:
            assert_equal_weights(final_weights(folder), final_weights(tmp_path / "whole"))
            runs += 1
            folder = tmp_path / str(runs)
        else:
            kills += 1
    assert end_of(long, folder) == 0
    assert_equal_weights(final_weights(folder), final_weights(tmp_path / "whole"))


def fill_the_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def run_out_of_disk(folder: Path) -> str:
    trainer = Trainer(recipe(), folder)

    def on_step(step: int, steps: int, figures: dict[str, float]) -> None:
        if step == 5:
            trainer.checkpoints.wait()  # the checkpoint of step 3 is written beside the steps after it
            fill_the_disk()

    trainer.on_step = on_step
    with pytest.raises(OpenSoraError) as error:
        trainer.run()
    return str(error.value)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_full_disk_stops_the_run_which_goes_on_when_there_is_room(tmp_path: Path, num_ranks: int) -> None:
    messages = run_ranks(num_ranks, run_out_of_disk, tmp_path / "cut")
    assert len(set(messages)) == 1
    assert "checkpoint of step 6 cannot be written" in messages[0] and "\n" not in messages[0]
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-00000003"]
    run_ranks(num_ranks, run, recipe(), tmp_path / "cut")
    run_ranks(num_ranks, run, recipe(), tmp_path / "whole")
    assert_equal_weights(final_weights(tmp_path / "cut"), final_weights(tmp_path / "whole"))


def stop_at_step_5(folder: Path, rank: int, number: int) -> int:
    """A signal to one of the ranks; returns after which step this one ended."""
    trainer = Trainer(recipe(), folder)

    def on_step(step: int, steps: int, figures: dict[str, float]) -> None:
        if step == 5 and trainer.mesh.rank == rank:
            os.kill(os.getpid(), number)

    trainer.on_step = on_step
    with stopping_between_steps(trainer), pytest.raises(KeyboardInterrupt, match="stopped after step 5"):
        trainer.run()
    return trainer.step


@pytest.mark.parametrize(("num_ranks", "number"), [(1, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_to_any_rank_saves_the_step_under_way(tmp_path: Path, num_ranks: int, number: int) -> None:
    ended = run_ranks(num_ranks, stop_at_step_5, tmp_path / "cut", num_ranks - 1, number)
    assert ended == [5] * num_ranks
    path, _ = newest_checkpoint(tmp_path / "cut" / "checkpoints")
    assert path is not None and path.name == "step-00000005"
    run_ranks(num_ranks, run, recipe(), tmp_path / "cut")
    run_ranks(num_ranks, run, recipe(), tmp_path / "whole")
    assert_equal_weights(final_weights(tmp_path / "cut"), final_weights(tmp_path / "whole"))


def run_and_lose_rank_1(folder: Path) -> None:
    if torch.distributed.get_rank() == 1:
        kill_in_second_checkpoint("with a file written in part", folder)
    run(recipe(), folder)


def test_a_rank_that_dies_inside_a_checkpoint_leaves_the_one_before(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="rank"):
        run_ranks(2, run_and_lose_rank_1, tmp_path / "cut")
    path, damages = newest_checkpoint(tmp_path / "cut" / "checkpoints")
    assert path is not None and path.name == "step-00000003" and not damages
    run_ranks(2, run, recipe(), tmp_path / "cut")
    run_ranks(2, run, recipe(), tmp_path / "whole")
    assert_equal_weights(final_weights(tmp_path / "cut"), final_weights(tmp_path / "whole"))
