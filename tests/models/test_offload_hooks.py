"""Offloading seen from the module: ways in besides `forward`, where a network computes, weights that are shared."""

import pytest
import torch
from tiny_pipeline import make_autoencoder, make_text_encoder
from torch import Tensor, nn

from opensora.models.offload_hooks import apply_offload_hooks, execution_device, merge_tied_layers

CPU = torch.device("cpu")


class Codec(nn.Module):
    """Two ways in, one of which takes the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    @apply_offload_hooks
    def encode(self, values: Tensor) -> Tensor:
        return self.layer(values)

    @apply_offload_hooks
    def encode_twice(self, values: Tensor) -> Tensor:
        return self.encode(self.encode(values))


def in_groups_on_disk(module: nn.Module, folder: str, level: str = "block_level") -> None:
    hooks = pytest.importorskip("diffusers.hooks")
    hooks.apply_group_offloading(
        module, CPU, CPU, offload_type=level, num_blocks_per_group=1, offload_to_disk_path=folder
    )
    for parameter in module.parameters():  # what lies in memory while the weights are away is anything
        parameter.data.fill_(torch.nan)


@pytest.mark.parametrize("way", ["encode", "encode_twice"])
def test_every_way_in_brings_groups_in_and_sends_them_away(way, tmp_path):
    codec, values = Codec(), torch.ones(1, 2)
    expected = getattr(codec, way)(values)
    in_groups_on_disk(codec, str(tmp_path))
    loads = []
    group = codec._diffusers_hook.get_hook("group_offloading").group  # type: ignore
    bring_in, send_away = group.onload_, group.offload_
    group.onload_ = lambda: (loads.append("in"), bring_in())
    group.offload_ = lambda: (loads.append("away"), send_away())
    torch.testing.assert_close(getattr(codec, way)(values), expected)
    assert loads[0] == "in" and loads[-1] == "away"


def test_a_way_in_that_fails_sends_its_weights_away(tmp_path):
    codec, away = Codec(), []
    in_groups_on_disk(codec, str(tmp_path))
    group = codec._diffusers_hook.get_hook("group_offloading").group  # type: ignore
    group.offload_ = lambda: away.append(1)
    with pytest.raises(RuntimeError):
        codec.encode(torch.ones(1, 3))
    assert away == [1]


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_an_autoencoder_in_groups_on_disk(level, tmp_path):
    autoencoder, video = make_autoencoder(), torch.rand(1, 3, 5, 16, 24)
    with torch.no_grad():
        latents = autoencoder.encode_video(video)
        expected = autoencoder.decode_latents(latents, 5), autoencoder.posterior(video).mean
        in_groups_on_disk(autoencoder, str(tmp_path), level)
        torch.testing.assert_close(autoencoder.encode_video(video), latents)
        torch.testing.assert_close(autoencoder.decode_latents(latents, 5), expected[0])
        torch.testing.assert_close(autoencoder.posterior(video).mean, expected[1])


def test_where_a_network_computes(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    assert execution_device(nn.Linear(2, 2)) == CPU
    assert execution_device(nn.Linear(2, 2, device="meta")) == torch.device("meta")
    layer_by_layer, grouped, whole = Codec(), Codec(), Codec()
    accelerate.cpu_offload(layer_by_layer, CPU)
    assert all(parameter.is_meta for parameter in layer_by_layer.parameters())
    in_groups_on_disk(grouped, str(tmp_path))
    accelerate.cpu_offload_with_hook(whole, torch.device("meta"))
    assert [execution_device(module).type for module in (layer_by_layer, grouped, whole)] == ["cpu", "cpu", "meta"]


def test_layers_that_share_their_weights_become_one(tmp_path):
    """The token embeddings of T5 are two layers of one weight, which group offloading would lose on disk."""
    encoder, tokens = make_text_encoder(), torch.tensor([[1, 2, 3]])
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with torch.no_grad():
        expected = encoder(input_ids=tokens)[0]
        merge_tied_layers(encoder)
        assert encoder.get_submodule("shared") is encoder.get_submodule("encoder.embed_tokens")
        assert encoder.state_dict().keys() == state.keys()
        in_groups_on_disk(encoder, str(tmp_path), "leaf_level")
        torch.testing.assert_close(encoder(input_ids=tokens)[0], expected)


def test_layers_of_equal_weights_stay_two():
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    layers[1].load_state_dict(layers[0].state_dict())
    merge_tied_layers(layers)
    assert layers[0] is not layers[1]
