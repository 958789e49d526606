"""A run goes on: longer, at another rate, from its checkpoints; and its checkpoints are models."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_regression import assert_equal_weights, final_weights, recipe
from tiny_tasks import diffusion_config, family_config, vae_config, write_clips

from opensora.adapters.adapter import read_adapter
from opensora.adapters.reading import adapter_file, adapter_hash, is_adapter
from opensora.checkpoints.conversion import convert
from opensora.checkpoints.fit import inspect_model
from opensora.checkpoints.loading import load_pipeline
from opensora.checkpoints.source import ModelSource, find_part
from opensora.cli.main import main
from opensora.errors import OpenSoraError
from opensora.generation.loading import load_model
from opensora.generation.request import ClipRequest
from opensora.training.config import LoopConfig, Recipe
from opensora.training.diffusion.adaptation import build_transformer
from opensora.training.diffusion.lora import LoRAConfig
from opensora.training.diffusion.networks import DiffusionNetworks
from opensora.training.optimizer import OptimizerConfig
from opensora.training.record import FREE_TO_CHANGE, RECORDED_WHEN_CHANGED
from opensora.training.trainer import Trainer

# --- what may be changed when a run goes on ---------------------------------------------------------------------------


def constant(**changes):
    """Rates without a schedule."""
    return OptimizerConfig(**{"warmup_steps": 0, "decay": 0.0, **changes})


def history(folder: Path):
    return json.loads((folder / "history.json").read_text())


def test_a_finished_run_is_extended(tmp_path: Path) -> None:
    """Without a schedule, six steps and six more are twelve, bit for bit."""
    Trainer(recipe(steps=12, optimizer=constant()), tmp_path / "whole").run()
    Trainer(recipe(steps=6, optimizer=constant()), tmp_path / "two").run()
    trainer = Trainer(recipe(steps=12, optimizer=constant()), tmp_path / "two")
    assert trainer.step == 6 and trainer.notes == ["loop.steps=12 from step 6 on (was 6)"]
    trainer.run()
    assert_equal_weights(final_weights(tmp_path / "whole"), final_weights(tmp_path / "two"))
    assert {"step": 6, "changed": {"loop.steps": [6, 12]}} in history(tmp_path / "two")
    assert json.loads((tmp_path / "two" / "recipe.json").read_text())["loop"]["steps"] == 12
    assert Trainer(recipe(steps=12, optimizer=constant()), tmp_path / "two").notes == []


def test_a_schedule_that_rises_again_is_told(tmp_path: Path) -> None:
    Trainer(recipe(steps=6, optimizer=OptimizerConfig(warmup_steps=0)), tmp_path).run()
    trainer = Trainer(recipe(steps=60, optimizer=OptimizerConfig(warmup_steps=0)), tmp_path)
    assert trainer.notes[1] == "the schedule goes on at 100% of the peak learning rate; it was at 0%"


def test_the_learning_rate_may_be_changed(tmp_path: Path) -> None:
    Trainer(recipe(steps=3), tmp_path).run()
    lower = OptimizerConfig(lr=1e-5, muon_lr=1e-4, betas=(0.8, 0.9), warmup_steps=5)
    trainer = Trainer(recipe(steps=6, optimizer=lower, max_grad_norm=0.5, precision="bf16"), tmp_path)
    assert {note.partition("=")[0] for note in trainer.notes if "=" in note} == {
        "loop.steps",
        "loop.optimizer.lr",
        "loop.optimizer.muon_lr",
        "loop.optimizer.betas",
        "loop.max_grad_norm",
        "loop.precision",
    }
    assert trainer.optimizer.peak_rates == {"adamw": 1e-5, "muon": 1e-4}
    trainer.train_step()
    rates = {group["lr"] for part in trainer.optimizer.parts.values() for group in part.param_groups}
    assert max(rates) <= 1e-4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 7}, r"loop.seed=7 (was 0)"),
        ({"optimizer": OptimizerConfig(matrices="adamw")}, "loop.optimizer.matrices=adamw (was muon)"),
    ],
)
def test_what_decided_the_weights_may_not(tmp_path: Path, changes, said) -> None:
    Trainer(recipe(steps=3), tmp_path).run()
    before = (tmp_path / "recipe.json").read_text()
    with pytest.raises(OpenSoraError) as error:
        Trainer(recipe(steps=9, **changes), tmp_path)
    assert said in str(error.value) and f"objective.init_from={tmp_path}" in str(error.value)
    assert (tmp_path / "recipe.json").read_text() == before and history(tmp_path) == [{"exported": 3}]


def test_fewer_steps_than_were_done_are_refused(tmp_path: Path) -> None:
    Trainer(recipe(steps=6), tmp_path).run()
    with pytest.raises(OpenSoraError, match=r"for 6 steps and loop\.steps=3 asks for fewer; give loop.steps=6"):
        Trainer(recipe(steps=3), tmp_path)
    assert json.loads((tmp_path / "recipe.json").read_text())["loop"]["steps"] == 6


def test_every_setting_of_the_loop_is_decided_once() -> None:
    assert not [name for name in RECORDED_WHEN_CHANGED if name.startswith(FREE_TO_CHANGE)]
    known = {f"loop.{name}" for name in LoopConfig.__dataclass_fields__}
    of_optimizer = {
        f"loop.{o}.{name}" for o in ("optimizer", "critic") for name in OptimizerConfig.__dataclass_fields__
    }
    assert set(RECORDED_WHEN_CHANGED) <= known | of_optimizer


# --- checkpoints are models -------------------------------------------------------------------------------------------


def train(objective, folder: Path, settings: dict | None = None) -> None:
    loop = {"steps": 4, "checkpoint_every": 2, "precision": "fp32", "keep_checkpoints": 3} | (settings or {})
    Trainer(Recipe("tiny", objective, LoopConfig(**loop)), folder).run()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of transformer and text encoder, four steps, with checkpoints of two of them."""
    folder = tmp_path_factory.mktemp("runs")
    train(diffusion_config("flow", folder, preview=None), folder / "x")
    return folder / "x"


def averages(run: Path, step: int) -> dict[str, torch.Tensor]:
    found = {}
    for file in (run / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            names = [name for name in opened.keys() if name.startswith("average/")]
            found |= {name.removeprefix("average/"): opened.get_tensor(name) for name in names}
    return found


def weights_of(pipeline) -> dict[str, torch.Tensor]:
    parts = {"transformer": pipeline.transformer, "text_encoder": pipeline.text_encoder}
    return {f"{part}.{name}": t for part, network in parts.items() for name, t in network.state_dict().items()}


@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize("spelling", ["{run}@{step}", "{run}/checkpoints/step-{step:08d}"])
def test_a_checkpoint_is_the_model_of_its_averages(run: Path, step: int, spelling: str) -> None:
    found = weights_of(load_pipeline(spelling.format(run=run, step=step)))
    assert all(torch.equal(found[name], tensor) for name, tensor in averages(run, step).items())


def test_a_run_is_its_finished_model_or_its_newest_checkpoint(run: Path, tmp_path: Path, caplog) -> None:
    finished, last = (load_pipeline(name) for name in (run, f"{run}@latest"))
    assert f"{run}: taking its finished model, of step 4" in caplog.text
    assert all(torch.equal(tensor, weights_of(last)[name]) for name, tensor in weights_of(finished).items())
    assert dict(finished.config) | {"_name_or_path": 0} == dict(last.config) | {"_name_or_path": 0}
    copy = tmp_path / "extended"
    shutil.copytree(run, copy)
    (copy / "history.json").write_text(json.dumps([{"step": 2, "changed": {}}, {"exported": 2}]))
    assert ModelSource.find(copy).folder == copy / "checkpoints" / "step-00000004"
    assert "its newest checkpoint, of step 4" in caplog.text
    shutil.rmtree(copy / "model")
    assert ModelSource.find(copy).folder == copy / "checkpoints" / "step-00000004"
    shutil.rmtree(copy / "checkpoints")
    (copy / "checkpoints").mkdir()
    with pytest.raises(OpenSoraError, match="is a run without a checkpoint yet"):
        ModelSource.find(copy)


@pytest.mark.parametrize("which", ["3", "400", "-1", "newest", ""])
def test_a_step_that_is_not_there_names_those_that_are(run: Path, which: str, capsys) -> None:
    with pytest.raises(OpenSoraError, match=f"has no checkpoint '{which}'; it has those of steps 2, 4; its finished"):
        load_pipeline(f"{run}@{which}")
    assert main(["inspect", f"{run}@{which}"]) == 2
    assert "those of steps 2, 4" in capsys.readouterr().err


def test_a_folder_whose_name_holds_an_at_sign_is_itself(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "x@4")
    assert ModelSource.find(tmp_path / "x@4").folder == tmp_path / "x@4" / "model"
    assert ModelSource.find(f"{tmp_path / 'x@4'}@2").folder == tmp_path / "x@4" / "checkpoints" / "step-00000002"


def test_a_checkpoint_is_inspected_recorded_and_converted(run: Path, tmp_path: Path, capsys) -> None:
    report = inspect_model(f"{run}@2", on_progress=lambda what, done, total: None)
    assert report.problems == [] and report.sha256 == ModelSource.find(f"{run}@2").hash()
    assert report.sha256 != ModelSource.find(f"{run}@4").hash()
    assert main(["inspect", f"{run}@2", "--quick"]) == 0
    assert "nothing is wrong with it" in capsys.readouterr().out
    _, loaded = load_model(ClipRequest("a small red ball", model=f"{run}@2", device="cpu"))
    assert loaded.name == "x@2" and loaded.sha256 == report.sha256
    assert convert(f"{run}@2", tmp_path / "out").problems == []
    found = weights_of(load_pipeline(tmp_path / "out"))
    assert all(torch.equal(found[name], tensor) for name, tensor in averages(run, 2).items())


@pytest.mark.parametrize("origin", ["{run}@2", "{run}"])
def test_training_starts_from_averages(run: Path, origin: str) -> None:
    step = 2 if origin.endswith("@2") else 4
    transformer = build_transformer("STDiT3", None, origin.format(run=run), (), "cpu").state_dict()
    trained = {n: t for n, t in averages(run, step).items() if n.startswith("transformer.")}
    assert all(torch.equal(transformer[name.removeprefix("transformer.")], t) for name, t in trained.items())


def test_parts_that_are_not_trained_are_those_of_the_beginning(tmp_path: Path) -> None:
    """The spatial half of a transformer, its autoencoder and its encoder are not in checkpoints."""
    objective = family_config("1.2", write_clips(tmp_path / "clips"), train="temporal", export_dtype="float32")
    train(objective, tmp_path / "run", {"steps": 2})
    finished, last = (load_pipeline(name) for name in (tmp_path / "run", f"{tmp_path / 'run'}@2"))
    assert len(averages(tmp_path / "run", 2)) < len(finished.transformer.state_dict())
    for part in ("transformer", "autoencoder", "text_encoder"):
        one, other = (getattr(pipeline, part).state_dict() for pipeline in (finished, last))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_an_autoencoder_in_training_is_a_part(tmp_path: Path) -> None:
    train(vae_config("frames"), tmp_path / "run", {"steps": 2})
    found = find_part(f"{tmp_path / 'run'}@2", "autoencoder").load().state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in averages(tmp_path / "run", 2).items())
    assert inspect_model(f"{tmp_path / 'run'}@2").kind == "autoencoder"
    with pytest.raises(OpenSoraError, match="checkpoint of one part alone"):
        load_pipeline(f"{tmp_path / 'run'}@2")


def test_a_run_of_an_adapter_is_its_adapter(run: Path, tmp_path: Path) -> None:
    objective = diffusion_config("flow", run.parent, preview=None, transformer=None, init_from=str(run / "model"))
    objective = objective.__class__(**{**vars(objective), "train": LoRAConfig(rank=2), "text": frozen_text(run)})
    train(objective, tmp_path / "lora", {"steps": 1})
    assert adapter_file(tmp_path / "lora").parent == tmp_path / "lora" / "model"
    with pytest.raises(OpenSoraError, match="is an adapter; give it with `adapter`"):
        load_pipeline(tmp_path / "lora")
    finished, last = (read_adapter(name) for name in (tmp_path / "lora", f"{tmp_path / 'lora'}@1"))
    assert finished.origin == last.origin and finished.layers.keys() == last.layers.keys()
    assert all(
        torch.equal(a, last.layers[n][0]) and torch.equal(b, last.layers[n][1]) for n, (a, b) in finished.layers.items()
    )
    assert is_adapter(f"{tmp_path / 'lora'}@1") and len(adapter_hash(f"{tmp_path / 'lora'}@1")) == 64
    load_pipeline(run, adapters={f"{tmp_path / 'lora'}@1": 1.0})
    with pytest.raises(OpenSoraError, match="is an adapter; give it with `adapter`"):
        load_pipeline(f"{tmp_path / 'lora'}@1")
    with pytest.raises(OpenSoraError, match="is a checkpoint of no adapter"):
        read_adapter(f"{run}@2")


def frozen_text(run: Path):
    from opensora.training.diffusion.text import FrozenText

    return FrozenText(str(run / "model"))


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_is_put_together(run: Path, tmp_path: Path) -> None:
    objective = diffusion_config("flow", run.parent, preview=None)
    run_ranks(2, train, objective, tmp_path / "two", {"sharding": "full", "steps": 2})
    finished, last = (weights_of(load_pipeline(n)) for n in (tmp_path / "two", f"{tmp_path / 'two'}@2"))
    assert all(torch.equal(tensor, last[name]) for name, tensor in finished.items())


# --- no advice begins trained weights anew ----------------------------------------------------------------------------


def test_weights_under_strange_names_are_no_reason_to_begin_anew(run: Path, tmp_path: Path) -> None:
    trained = {f"strange_{n}" if "blocks" not in n else n: t for n, t in weights_of_transformer(run).items()}
    save_file(trained, tmp_path / "x.safetensors")
    options = json.loads((run / "model" / "transformer" / "config.json").read_text())
    options = {name: value for name, value in options.items() if not name.startswith("_")}
    with pytest.raises(OpenSoraError) as error:
        build_transformer("STDiT3", options, tmp_path / "x.safetensors", (), "cpu")
    assert "new_parts" not in str(error.value) and "strange_" in str(error.value)


def weights_of_transformer(run: Path) -> dict[str, torch.Tensor]:
    return find_part(run / "model", "transformer").load().state_dict()


def test_a_last_layer_of_the_same_kind_is_never_begun_anew(run: Path) -> None:
    objective = diffusion_config("flow", run.parent, init_from=f"{run}@4", new_parts=("last_layer",))
    with pytest.raises(OpenSoraError, match=r"would begin its last_layer anew; leave .* objective\.new_parts=\[\]"):
        DiffusionNetworks(objective, "cpu")
    DiffusionNetworks(diffusion_config("iddpm", run.parent, init_from=f"{run}@4", new_parts=("last_layer",)), "cpu")
