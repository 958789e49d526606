"""Networks of which one block is in memory, and the next one."""

from typing import Any

import pytest
import torch
import transformers
from diffusers.hooks import FirstBlockCacheConfig
from safetensors.torch import load_file, save_file
from tiny_pipeline import make_pipeline, make_transformer, seeded
from tiny_published import pipeline_of
from tiny_two_encoders import pipeline_of as two_encoders_of
from torch import nn

from opensora import load_pipeline
from opensora.errors import OpenSoraError
from opensora.offloading import BlockStream, blocks_of, stream_to_accelerator

PROMPT = "a small red ball rolls left"


def is_away(module: nn.Module) -> bool:
    return all(weight.is_meta for weight in module.parameters())


def blocks_in_memory(network: nn.Module) -> list[str]:
    return [name for name, block in blocks_of(network).items() if not is_away(block)]


def sample(pipe: Any, **changes: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    options = {"generator": seeded(0), "num_inference_steps": 2, "output_type": "pt"}
    return pipe(PROMPT, **{**options, **changes}).frames


KINDS = {
    "1.2": make_pipeline,
    "1.3": lambda: pipeline_of("opensora-1.3"),
    "2.0": lambda: two_encoders_of("opensora-2.0"),
}


@pytest.fixture(scope="module", params=list(KINDS.values()), ids=list(KINDS))
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    request.param().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_pipeline("flow").save_pretrained(path)
    return path


# --- whole pipelines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_clip_to_the_bit(folder, dtype):
    pipe = load_pipeline(folder, dtype=dtype, offload="blocks")
    expected = sample(load_pipeline(folder, dtype=dtype))
    for _ in range(2):
        assert torch.equal(sample(pipe), expected)
        assert all(is_away(network) for network in pipe.networks.values() if isinstance(network, nn.Module))


def test_two_blocks_at_most_are_in_memory(folder):
    pipe = load_pipeline(folder, offload="blocks")
    seen: list[tuple[str, list[str]]] = []
    networks = [part for part in pipe.networks.values() if isinstance(part, nn.Module) and part is not pipe.autoencoder]
    for network in networks:
        for name, block in blocks_of(network).items():
            block.register_forward_hook(
                lambda _, args, result, name=name, network=network: seen.append((name, blocks_in_memory(network)))
            )
    sample(pipe)
    assert {name for name, _ in seen} == {name for network in networks for name in blocks_of(network)}
    assert all(len(there) <= 2 for _, there in seen)


def test_branches_and_caches_and_another_text_halfway(flow):
    whole, streamed = load_pipeline(flow), load_pipeline(flow, offload="blocks")

    def other_text(pipe, index, timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"].states * 0.5}

    for changes in ({"negative_prompt": "a blue square"}, {"callback_on_step_end": other_text}):
        options = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"], **changes}
        for pipe in (whole, streamed):
            pipe.sequential_guidance = True
        assert torch.equal(sample(streamed, **options), sample(whole, **options))
    for pipe in (whole, streamed):
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    assert torch.equal(sample(streamed, num_inference_steps=4), sample(whole, num_inference_steps=4))


def test_damaged_blocks_are_named_and_nothing_stays(flow, tmp_path):
    load_pipeline(flow).save_pretrained(tmp_path)
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["temporal_blocks.0.attn.qkv.weight"][0, 0] = torch.nan
    save_file(weights, file)
    pipe = load_pipeline(tmp_path, offload="blocks")
    with pytest.raises(OpenSoraError, match=r"transformer, temporal_blocks.0: NaN or infinite values in attn.qkv"):
        sample(pipe)
    assert is_away(pipe.transformer)


def test_adapters_cannot_lie_beside_what_is_read_again(flow):
    with pytest.raises(OpenSoraError, match="read from its files whenever it is needed"):
        load_pipeline(flow, offload="blocks").load_lora_weights({})


# --- one network ------------------------------------------------------------------------------------------------------


class Reads(dict[str, torch.Tensor]):
    """Weights that remember which of them were asked for."""

    def __init__(self, weights):
        super().__init__(weights)
        self.names: list[str] = []

    def __getitem__(self, name):
        self.names.append(name)
        return super().__getitem__(name)


def streamed(network: nn.Module) -> tuple[BlockStream, Reads]:
    weights = Reads({name: tensor.clone() for name, tensor in network.state_dict().items()})
    return BlockStream(network, weights, "weights"), weights


def test_the_next_block_is_read_while_one_works():
    network = make_transformer()
    stream, weights = streamed(network)
    first, second, *_ = blocks_of(network)
    stream.open()
    assert not any(name.startswith((f"{first}.", f"{second}.")) for name in weights.names)
    stream._before(first)
    ahead = stream._ahead
    assert ahead is not None and ahead[0] == second
    ahead[1].result(timeout=10)
    assert any(name.startswith(f"{second}.") for name in weights.names)
    assert blocks_in_memory(network) == [first, second]
    stream._after(first)
    assert blocks_in_memory(network) == [second]
    stream.close()
    assert is_away(network)


def test_blocks_that_are_left_out_are_let_go_of():
    network = make_transformer()
    stream, _ = streamed(network)
    first, _, third, *_ = blocks_of(network)
    stream.open()
    stream._before(first)
    stream._after(first)
    stream._before(third)
    assert third in blocks_in_memory(network) and len(blocks_in_memory(network)) <= 2
    stream.close()


def test_a_network_of_another_library():
    config = transformers.T5Config(d_model=8, d_kv=4, d_ff=16, num_heads=2, num_layers=3, vocab_size=10)
    encoder = transformers.T5EncoderModel(config).eval()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = encoder(ids).last_hidden_state
        stream, _ = streamed(encoder)
        assert list(blocks_of(encoder)) == [f"encoder.block.{i}" for i in range(3)]
        stream.open()
        assert torch.equal(encoder(ids).last_hidden_state, expected)
        assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
        stream.close()
    assert is_away(encoder)


@pytest.mark.parametrize("name", ["text_encoder", "transformer"])
def test_on_an_accelerator_diffusers_offloads_the_blocks(flow, name):
    """Here the CPU is the accelerator, so that it is seen that nothing else is changed."""
    pytest.importorskip("accelerate")
    pipe = load_pipeline(flow)
    expected = sample(pipe)
    stream_to_accelerator(getattr(pipe, name), torch.device("cpu"))
    assert torch.equal(sample(pipe), expected)
