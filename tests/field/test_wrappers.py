"""Weights under the names that training frameworks and other programs put around those of a network."""

import argparse
import json
from pathlib import Path

import pytest
import tiny_published
import torch
from safetensors.torch import save_file

from opensora.checkpoints.components import load_component
from opensora.checkpoints.conversion import convert
from opensora.checkpoints.fit import inspect_model
from opensora.checkpoints.key_maps import find_config
from opensora.errors import OpenSoraError
from opensora.models.autoencoders.video import VideoAutoencoder
from opensora.models.stdit3 import STDiT3

PART = tiny_published.tiny("opensora-1.2").transformer
CODEC = tiny_published.tiny("opensora-1.2").autoencoder


def state_of(part, seed=0):
    return {name: tensor.contiguous() for name, tensor in tiny_published.network(part, seed).state_dict().items()}


RAW, AVERAGED = state_of(PART, 1), state_of(PART, 2)


def under(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def within(segment, state):
    """What wraps every block puts a segment behind its number."""
    return {
        ".".join(part for k in name.split(".") for part in ([k, segment] if k.isdigit() else [k])): t
        for name, t in state.items()
    }


def flat(state, prefix=""):
    """As safetensors, which know no dictionaries in dictionaries."""
    found = {}
    for name, value in state.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor):
            found[prefix + name] = value.clone()
    return found


def write(container, state, folder):
    folder.mkdir(exist_ok=True)
    if container == "zip":
        torch.save(state, folder / "x.ckpt")
    elif container == "legacy":
        torch.save(state, folder / "x.bin", _use_new_zipfile_serialization=False)
    elif container == "safetensors":
        save_file(flat(state), folder / "x.safetensors")
    elif container == "misnamed":
        save_file(flat(state), folder / "x.pth")
    else:
        tiny_published.write_shards(folder, flat(state), "model", ".safetensors")
        if container == "no index":
            (folder / "model.safetensors.index.json").unlink()
        return folder
    return next(folder.iterdir())


def load(path, part=PART, cls=STDiT3):
    return load_component(path, cls, config=find_config(path, cls, part.config)).state_dict()


def assert_is(found, wanted):
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


ONE = {
    "DDP": lambda s: under("module.", s),
    "compile": lambda s: under("_orig_mod.", s),
    "compile of DDP": lambda s: under("_orig_mod.module.", s),
    "DDP of compile": lambda s: under("module._orig_mod.", s),
    "FSDP": lambda s: under("_fsdp_wrapped_module.", within("_fsdp_wrapped_module", s)),
    "FSDP with recomputation": lambda s: within("_fsdp_wrapped_module._checkpoint_wrapped_module", s),
    "compiled blocks": lambda s: within("_orig_mod", s),
    "blocks in DDP": lambda s: within("module", s),
    "Lightning": lambda s: {
        "epoch": 3,
        "state_dict": {**under("model.", s), "loss.lpips.weight": torch.ones(3)},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}],
        "hyper_parameters": {"args": argparse.Namespace(lr=0.1), "path": Path("runs")},
    },
    "Lightning of a compiled net": lambda s: {"state_dict": under("net._orig_mod.", s), "callbacks": {}},
    "ComfyUI": lambda s: under("model.diffusion_model.", s),
    "diffusion_model": lambda s: under("diffusion_model.", s),
    "DeepSpeed": lambda s: {"module": under("module.", s), "optimizer": None, "global_steps": 7, "param_shapes": []},
    "trainers' dictionaries": lambda s: {"weights": {"generator": s}, "step": 5},
    "one that nobody heard of": lambda s: under("my_trainer.inner.student.", s),
    "an adapter merged by PEFT": lambda s: under("base_model.model.", s),
    "SWA": lambda s: {"n_averaged": torch.tensor(3), **under("module.", s)},
}


EVERY = [(wrapping, container) for wrapping in ONE for container in ("zip", "safetensors")]
EVERY += [(w, c) for w in ("FSDP", "Lightning", "ComfyUI") for c in ("legacy", "misnamed", "shards", "no index")]


@pytest.mark.parametrize(("wrapping", "container"), EVERY)
def test_what_is_around_names_is_taken_off(tmp_path, wrapping, container):
    path = write(container, ONE[wrapping](RAW), tmp_path / "x")
    assert_is(load(path), RAW)


BOTH = {
    "EMA of a training script": lambda r, a: ({"model": r, "ema": a, "opt": {"state": {}}}, "model"),
    "model_ema of DDP": lambda r, a: ({"model": under("module.", r), "model_ema": under("module.", a)}, "raw"),
    "timm": lambda r, a: ({"state_dict": r, "state_dict_ema": a}, "state_dict"),
    "GANs": lambda r, a: ({"params": r, "params_ema": a}, "params"),
    "Lightning": lambda r, a: ({"state_dict": under("model.", r) | under("ema_model.module.", a)}, "raw"),
    "ema-pytorch": lambda r, a: (under("ema.online_model.", r) | under("ema.ema_model.", a), "ema.online_model"),
    "the average beside the network itself": lambda r, a: (r | under("ema.", a), "raw"),
    "latent diffusion": lambda r, a: (
        under("model.diffusion_model.", r)
        | {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(2)}
        | {"model_ema.diffusion_model" + name.replace(".", ""): tensor for name, tensor in a.items()},
        "raw",
    ),
}


@pytest.mark.parametrize("container", ["zip", "safetensors"])
@pytest.mark.parametrize("wrapping", BOTH)
def test_averages_are_taken_and_the_others_can_be_chosen(tmp_path, caplog, wrapping, container):
    state, other = BOTH[wrapping](RAW, AVERAGED)
    path = write(container, state, tmp_path / "x")
    assert_is(load(path), AVERAGED)
    assert "averaged weights" in caplog.text and "@" in caplog.text
    assert_is(load(path.with_name(f"{path.name}@{other}")), RAW)
    assert_is(load(path.with_name(f"{path.name}@ema")), AVERAGED)
    with pytest.raises(OpenSoraError, match="nothing called 'EMA2'; it holds a transformer"):
        load(path.with_name(f"{path.name}@EMA2"))


def test_averages_without_names_are_not_guessed(tmp_path, caplog):
    nameless = {"decay": 0.9, "shadow_params": list(AVERAGED.values())}
    torch.save({"model": RAW, "ema": nameless}, tmp_path / "x.pt")
    assert_is(load(tmp_path / "x.pt"), RAW)
    assert "stored without their names" in caplog.text
    torch.save(nameless, tmp_path / "y.pt")
    with pytest.raises(OpenSoraError, match="averaged weights without their names"):
        load(tmp_path / "y.pt")


def test_several_networks_of_a_kind_are_never_guessed(tmp_path):
    save_file(flat({"student": RAW, "teacher": AVERAGED}), tmp_path / "x.safetensors")
    with pytest.raises(OpenSoraError, match=r"\(student\), a transformer \(teacher\); say which .*safetensors@student"):
        load(tmp_path / "x.safetensors")
    assert_is(load(tmp_path / "x.safetensors@teacher"), AVERAGED)


def test_a_whole_model_in_one_file_is_taken_apart(tmp_path):
    codec = state_of(CODEC)
    encoder = state_of(tiny_published.tiny("opensora-1.2").text_encoder)
    path = tmp_path / "all.safetensors"
    parts = under("model.diffusion_model.", RAW) | under("vae.", codec) | under("text_encoders.t5.", encoder)
    save_file({name: tensor.clone() for name, tensor in parts.items()}, path)
    assert_is(load(path), RAW)
    assert_is(load(path, CODEC, VideoAutoencoder), codec)
    with pytest.raises(OpenSoraError, match=r"a transformer \(model.diff.*an autoencoder \(vae\)") as error:
        inspect_model(path)
    assert "\n" not in str(error.value)
    assert inspect_model(tmp_path / "all.safetensors@vae").kind == "autoencoder"
    assert inspect_model(tmp_path / "all.safetensors@text_encoder").kind == "text_encoder"
    report = convert(tmp_path / "all.safetensors@transformer", tmp_path / "out", model="opensora-1.2")
    assert report.problems == []
    assert_is(load_component(tmp_path / "out", STDiT3).state_dict(), RAW)


def test_a_file_whose_name_holds_an_at_sign_is_itself(tmp_path):
    save_file(flat({"model": RAW, "ema": AVERAGED}), tmp_path / "x")
    save_file(RAW, tmp_path / "x@ema")
    assert_is(load(tmp_path / "x@ema"), RAW)


def test_folders_of_deepspeed(tmp_path):
    run = tmp_path / "run"
    step = run / "global_step7"
    step.mkdir(parents=True)
    (run / "latest").write_text("global_step7\n")
    torch.save({"module": RAW, "global_steps": 7}, step / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {}}, step / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert_is(load(run), RAW)
    (step / "mp_rank_00_model_states.pt").rename(step / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(OpenSoraError, match=r"zero_to_fp32\.py"):
        load(run)


def test_shards_without_index_must_be_all_there(tmp_path):
    folder = write("no index", RAW, tmp_path / "x")
    (folder / "model-00002-of-00002.safetensors").unlink()
    (folder / "model-00001-of-00002.safetensors").rename(folder / "model-00001-of-00003.safetensors")
    (folder / "model-00002-of-00003.safetensors").write_bytes(
        (folder / "model-00001-of-00003.safetensors").read_bytes()
    )
    with pytest.raises(OpenSoraError, match="2 of 3 files of weights, 1 are missing"):
        load(folder)


def test_published_names_keep_their_own_module(tmp_path):
    """A published autoencoder has `module.` in its names, and none of it is a wrapper's."""
    codec = state_of(CODEC)
    assert any(".module." in name for name in codec)
    save_file(under("module.", codec), tmp_path / "x.safetensors")
    assert_is(load(tmp_path / "x.safetensors", CODEC, VideoAutoencoder), codec)
    described = json.dumps(inspect_model(tmp_path / "x.safetensors", on_progress=lambda *_: None).to_dict())
    assert "VideoAutoencoder" in described
