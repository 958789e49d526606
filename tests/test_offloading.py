"""Networks that are in memory in their stage only."""

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig
from tiny_pipeline import make_autoencoder, make_pipeline, make_text_encoder, make_transformer, seeded
from torch import nn

from opensora import load_pipeline
from opensora.conditioning.frames import condition
from opensora.errors import OpenSoraError
from opensora.generation.loops import generate_loops
from opensora.geometry import VideoSize
from opensora.offloading import Offloader

CPU = torch.device("cpu")


def is_away(network: nn.Module) -> bool:
    return all(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))


def staged(**loaders) -> tuple[Offloader, dict[str, nn.Module]]:
    networks = {name: load() for name, load in loaders.items()}
    return Offloader(CPU, networks, loaders), networks


def test_only_the_stage_at_work_is_in_memory():
    offloader, networks = staged(text_encoder=make_text_encoder, transformer=make_transformer)
    assert all(is_away(network) for network in networks.values())
    for name, other in (("text_encoder", "transformer"), ("transformer", "text_encoder")):
        with offloader.on_device(name):
            assert not any(tensor.is_meta for tensor in networks[name].state_dict().values())
            assert is_away(networks[other])
        assert is_away(networks[name])


@pytest.mark.parametrize("make", [make_text_encoder, make_transformer, make_autoencoder])
def test_what_comes_back_is_what_went(make):
    """Tables outside of the state dict included; the shapes are known while it is away."""
    original = make()
    offloader, networks = staged(network=make)
    shapes = {name: tensor.shape for name, tensor in networks["network"].state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in original.state_dict().items()}
    for _ in range(2):
        with offloader.on_device("network"):
            tensors = dict(networks["network"].named_parameters()) | dict(networks["network"].named_buffers())
            expected = dict(original.named_parameters()) | dict(original.named_buffers())
            assert tensors.keys() == expected.keys()
            for name, tensor in expected.items():
                assert torch.equal(tensors[name], tensor), name


def test_tied_weights_stay_tied():
    offloader, networks = staged(text_encoder=make_text_encoder)
    encoder: nn.Module = networks["text_encoder"]
    with offloader.on_device("text_encoder"):
        shared, embedded = encoder.get_parameter("shared.weight"), encoder.get_parameter("encoder.embed_tokens.weight")
        assert shared is embedded or shared.data_ptr() == embedded.data_ptr()


def test_the_module_stays_the_same_with_its_hooks():
    calls = []
    network = nn.Linear(2, 2)
    network.register_forward_hook(lambda *_: calls.append(1))
    offloader = Offloader(CPU, {"network": network}, {"network": lambda: nn.Linear(2, 2)})
    with offloader.on_device("network"):
        network(torch.zeros(1, 2))
    assert calls == [1]


def test_stages_may_lie_within_each_other():
    loads = []

    def load() -> nn.Module:
        loads.append(1)
        return nn.Linear(2, 2)

    offloader = Offloader(CPU, {"network": (network := nn.Linear(2, 2))}, {"network": load})
    with offloader.on_device("network"):
        with offloader.on_device("network"):
            assert not is_away(network)
        assert not is_away(network)
    assert is_away(network) and loads == [1]


def test_a_network_leaves_after_an_error_too():
    offloader, networks = staged(transformer=make_transformer)
    with pytest.raises(KeyboardInterrupt):
        with offloader.on_device("transformer"):
            raise KeyboardInterrupt
    assert is_away(networks["transformer"])
    with offloader.on_device("transformer"):
        assert not is_away(networks["transformer"])


def test_files_that_cannot_be_read_leave_it_away():
    def load() -> nn.Module:
        raise OpenSoraError("damaged")

    offloader = Offloader(CPU, {"network": (network := nn.Linear(2, 2))}, {"network": load})
    with pytest.raises(OpenSoraError, match="damaged"):
        with offloader.on_device("network"):
            raise AssertionError("there is nothing to work with")
    assert is_away(network)


def test_on_the_cpu_there_must_be_files():
    with pytest.raises(OpenSoraError, match="transformer"):
        Offloader(CPU, {"transformer": make_transformer()}, {})


# --- whole pipelines --------------------------------------------------------------------------------------------------

PROMPT = "a small red ball rolls left"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_pipeline("flow", num_frames=18).save_pretrained(path)
    return path


def test_an_offloaded_pipeline_makes_the_same_clip(folder):
    whole, offloaded = load_pipeline(folder), load_pipeline(folder, offload=True)
    assert all(is_away(getattr(offloaded, name)) for name in ("text_encoder", "transformer", "autoencoder"))
    clips = []
    for pipe in (whole, offloaded):
        pipe.set_progress_bar_config(disable=True)
        with pipe.on_device("autoencoder"):
            conditioning = condition(pipe.autoencoder, VideoSize(18, 16, 24), image=torch.zeros(3, 1, 16, 24))
        clips.append(pipe(PROMPT, generator=seeded(0), conditioning=conditioning, output_type="pt").frames)
    torch.testing.assert_close(clips[0], clips[1])
    assert all(is_away(getattr(offloaded, name)) for name in ("text_encoder", "transformer", "autoencoder"))
    assert offloaded.device == CPU


def test_a_long_offloaded_video(folder):
    pipe = load_pipeline(folder, offload=True)
    pipe.set_progress_bar_config(disable=True)
    frames = generate_loops(pipe, PROMPT, num_loops=2, size=VideoSize(17, 16, 24), num_inference_steps=1).frames
    assert frames.shape[1] == 17 + 12


@pytest.mark.parametrize("negative_prompt", [None, "a blue square"])
def test_branches_one_after_the_other_make_the_same_clip(folder, negative_prompt):
    pipe = load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    batches: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    at_once = pipe(
        [PROMPT, PROMPT], negative_prompt, generator=seeded(0, 1), num_inference_steps=2, output_type="pt"
    ).frames
    pipe.sequential_guidance = True
    by_turns = pipe(
        [PROMPT, PROMPT], negative_prompt, generator=seeded(0, 1), num_inference_steps=2, output_type="pt"
    ).frames
    assert batches == [4] * 2 + [2] * 4
    torch.testing.assert_close(at_once, by_turns, rtol=1e-4, atol=1e-4)


def test_caches_work_with_branches_one_after_the_other(folder):
    pipe = load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    pipe.sequential_guidance = True
    cached = pipe(PROMPT, generator=seeded(0), output_type="pt").frames
    pipe.transformer.disable_cache()
    torch.testing.assert_close(cached, pipe(PROMPT, generator=seeded(0), output_type="pt").frames, rtol=1e-4, atol=1e-4)


def test_an_offloaded_pipeline_has_nothing_to_save(folder, tmp_path):
    with pytest.raises(OpenSoraError, match="cannot be saved"):
        load_pipeline(folder, offload=True).save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
