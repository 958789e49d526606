"""Figures and previews in TensorBoard and in Weights & Biases, whose runs stay in the run's folder unless sent."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest

from opensora.errors import OpenSoraError
from opensora.media.write import write_video
from opensora.overrides import apply_overrides
from opensora.recipes import find_recipe
from opensora.training.metrics import Metrics
from opensora.training.trackers import check_trackers, preview_name
from opensora.training.trainer import Trainer

TINY = [
    *("loop.steps=2", "loop.log_every=1", "loop.preview_every=2", 'objective.preview.prompts=["a cat"]'),
    *("objective.data.num_clips=4", "objective.data.other_lengths=[]", "objective.data.batch_size=2"),
    *("objective.defaults.num_inference_steps=1", "objective.defaults.num_frames=4"),
]


class Recorder:
    """What of W&B is called here, with what it was told."""

    def __init__(self):
        self.begun, self.logged, self.metrics, self.finished = [], [], [], 0
        self.Settings = lambda **options: SimpleNamespace(**options)
        self.Image = lambda path: ("image", Path(path).name)
        self.Video = lambda path, format: ("video", Path(path).name, format)
        self.__spec__ = SimpleNamespace(name="wandb")

    def init(self, **options):
        self.begun.append(options)
        return self

    def define_metric(self, name, step_metric):
        self.metrics.append((name, step_metric))

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    fake = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.fixture
def previews(tmp_path):
    """A sheet and a clip, as previews write them."""
    folder = tmp_path / "previews"
    folder.mkdir()
    PIL.Image.new("RGB", (24, 16), "red").save(folder / "step-00000002.png")
    import torch

    write_video(folder / "step-00000002-0.mp4", torch.zeros(3, 4, 16, 24), 8)
    return sorted(folder.iterdir())


def images_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


def test_tensorboard_holds_figures_and_previews(tmp_path, previews):
    pytest.importorskip("tensorboard")
    metrics = Metrics(tmp_path, 0)
    metrics.write(2, {"loss": 0.5}, previews)
    metrics.write(4, {}, previews[:1])
    metrics.close()
    events = images_of(tmp_path / "tensorboard")
    assert [event.value for event in events.Scalars("loss")] == [0.5]
    assert set(events.Tags()["images"]) == {"previews/sheet", "previews/0"}
    sheet, clip = (events.Images(f"previews/{name}")[0] for name in ("sheet", "0"))
    assert (sheet.step, sheet.width, sheet.height) == (2, 24, 16) and sheet.encoded_image_string[:4] == b"\x89PNG"
    assert (clip.width, clip.height) == (24, 16) and clip.encoded_image_string[:3] == b"GIF"
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [2]


def test_a_run_tells_both_trackers(tmp_path, wandb, monkeypatch):
    folder = tmp_path / "run"
    recipe = apply_overrides(find_recipe("v1_2_debug"), [*TINY, "loop.trackers=tensorboard,wandb"])
    trainer = Trainer(recipe, folder)
    assert "wandb: offline" in trainer.notes[0] and "wandb sync" in trainer.notes[0]
    trainer.run()
    (begun,) = wandb.begun
    assert begun["mode"] == "offline" and begun["dir"] == str(folder) and begun["name"] == "run"
    assert begun["config"]["loop"]["steps"] == 2 and wandb.finished == 1
    assert [values["step"] for values in wandb.logged if "loss" in values] == [1, 2]
    shown = [values for values in wandb.logged if "previews/0" in values]
    assert shown == [{"previews/0": ("video", "step-00000002-0.mp4", "mp4"), "step": 2}]
    assert importlib.util.find_spec("tensorboard") is None or images_of(folder / "tensorboard").Images("previews/0")
    changed = apply_overrides(find_recipe("v1_2_debug"), [*TINY, "loop.trackers=[]"])
    Trainer(changed, folder).run()  # trackers may change when a run is resumed
    assert len(wandb.begun) == 1


def test_a_resumed_run_goes_on_under_its_id(tmp_path, wandb, monkeypatch):
    for _ in range(2):
        Metrics(tmp_path, 0, ("wandb",)).close()
    first, second = wandb.begun
    assert first["id"] == second["id"] and first["resume"] == "allow"
    monkeypatch.setenv("WANDB_MODE", "online")  # W&B's own variable: the user wants it sent
    Metrics(tmp_path, 0, ("wandb",)).close()
    assert wandb.begun[-1]["mode"] == "online"


def test_wandb_that_is_not_installed_is_found_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OpenSoraError, match="wandb, which is not installed; pip install wandb"):
        check_trackers(("wandb",), tmp_path)
    assert not check_trackers(("tensorboard",), tmp_path)


def test_unknown_trackers_are_refused():
    with pytest.raises(OpenSoraError, match="tensorboard, wandb"):
        apply_overrides(find_recipe("v1_2_debug"), ["loop.trackers=mlflow"])


@pytest.mark.parametrize(
    ("file", "name"), [("step-00000500.png", "sheet"), ("step-00000500-3.mp4", "3"), ("step-00000500-a-b.mp4", "a-b")]
)
def test_names_of_previews(file, name):
    assert preview_name(Path(file)) == name


@pytest.mark.slow
def test_wandb_itself_works_without_network_and_login(tmp_path, previews, monkeypatch):
    pytest.importorskip("wandb")
    for variable in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody answers there
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "elsewhere"))
    for step in (2, 4):  # the second time as a resumed run
        metrics = Metrics(tmp_path, step - 2, ("wandb",), {"loop": {"steps": 4}})
        metrics.write(step, {"loss": float(np.float32(0.5)), "grad_norm": float("nan")}, previews)
        metrics.close()
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert runs and all(list(run.glob("*.wandb")) for run in runs)
    assert {path.suffix for run in runs for path in run.rglob("media/**/*") if path.is_file()} == {".png", ".mp4"}
