"""Weights are recognised by names and shapes alone, and a network built from what was found has the same ones."""

import json
import pickle
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from exploit import Exploit
from safetensors.torch import save_file
from tiny_pipeline import make_autoencoder
from tiny_transformers import TINY, build
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

from opensora.containers.tensors import TensorInfo
from opensora.errors import OpenSoraError
from opensora.models.autoencoders.causal import CausalVideoAutoencoder
from opensora.models.autoencoders.dc_ae import VideoDCAutoencoder
from opensora.models.autoencoders.hunyuan import HunyuanVideoAutoencoder
from opensora.models.autoencoders.video import VideoAutoencoder
from opensora.models.format import Identity
from opensora.models.identify import identify
from opensora.models.stdit import STDiT
from opensora.models.stdit2 import STDiT2
from opensora.models.stdit3 import STDiT3
from opensora.models.stdit4 import STDiT4
from opensora.weights import read_header


def shapes(network):
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def on_meta(build):
    with torch.device("meta"):
        return build()


def identified(tensors) -> Identity:
    found = identify(tensors)
    assert found is not None
    return found


PUBLISHED: dict[str, tuple[Any, dict[str, Any]]] = {
    "stdit_xl2_v1_0_16x256x256": (STDiT, {"input_size": [16, 32, 32], "model_max_length": 120}),
    "stdit_xl2_v1_0_16x512x512": (STDiT, {"input_size": [16, 64, 64], "model_max_length": 120}),
    "stdit_xl2_v1_0_64x512x512": (STDiT, {"input_size": [64, 64, 64], "model_max_length": 120}),
    "stdit2_xl2_v1_1": (STDiT2, {"num_heads": 16, "qk_norm": True, "model_max_length": 200}),
    "stdit3_xl2_v1_2": (STDiT3, {"num_heads": 16, "qk_norm": True, "model_max_length": 300}),
    "stdit3_3b2_v1_2": (STDiT3, {"num_heads": 26, "hidden_size": 1872, "depth": 28}),
    "stdit3_xl2_v1_3": (STDiT4, {"num_heads": 16, "qk_norm": True, "model_max_length": 300, "in_channels": 16}),
}


def published(golden_json, name):
    keys = golden_json(f"checkpoint_keys/{name}")["keys"]
    return {name: TensorInfo(tuple(shape), dtype) for name, (shape, dtype) in keys.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_transformers(golden_json, name):
    cls, expected = PUBLISHED[name]
    header = published(golden_json, name)
    found = identified(header)
    assert found.class_name == cls.__name__ and found.kind == "transformer"
    assert expected.items() <= found.config.items()
    assert {"pred_sigma": True, "caption_channels": 4096}.items() <= found.config.items()
    assert found.config["in_channels"] == expected.get("in_channels", 4)
    rebuilt = on_meta(lambda: cls(**found.config))
    assert shapes(rebuilt) == {name: info.shape for name, info in header.items()}


def test_published_autoencoders(golden_json):
    header = published(golden_json, "opensora_vae_v1_2")
    found = identified(header)
    assert found.class_name == "VideoAutoencoder" and "1.2" in found.summary
    assert found.config["temporal"]["temporal_downsample"] == [False, True, True]
    rebuilt = on_meta(lambda: VideoAutoencoder(**found.config))
    assert shapes(rebuilt) == {name: info.shape for name, info in header.items()}

    header = published(golden_json, "sd_vae_autoencoderkl")
    found = identified(header)
    assert (found.library, found.class_name) == ("diffusers", "AutoencoderKL")
    assert shapes(on_meta(lambda: AutoencoderKL(**found.config))) == {name: info.shape for name, info in header.items()}
    assert "0.18215" in found.unsure["scaling_factor"] and "0.13025" in found.unsure["scaling_factor"]


def test_later_autoencoders(golden_json):
    for name, cls, word in (
        ("opensora_vae_v1_3", CausalVideoAutoencoder, "1.3"),
        ("hunyuan_vae_v2_0", HunyuanVideoAutoencoder, "HunyuanVideo"),
        ("dc_ae_f32t4c128_v2_0", VideoDCAutoencoder, "deep compression"),
    ):
        header = published(golden_json, name)
        found = identified(header)
        assert found.class_name == cls.__name__ and found.supported and word in found.summary
        rebuilt = on_meta(lambda cls=cls, config=found.config: cls(**config))
        assert shapes(rebuilt) == {name: info.shape for name, info in header.items()}


@pytest.mark.parametrize(
    ("names", "word"),
    [
        (["blocks.0.cross_attn.proj.bias", "y_embedder.y_proj.fc1.bias", "t_block.1.bias", "pos_embed"], "PixArt"),
        (["blocks.0.adaLN_modulation.1.weight", "y_embedder.embedding_table.weight"], "DiT"),
    ],
)
def test_other_networks_are_called_by_their_names(names, word):
    found = identified({name: TensorInfo((4, 4), "float32") for name in names})
    assert not found.supported and word in found.summary


def test_image_transformers_are_no_video_transformers():
    """PixArt has 2D patches and no attention in time."""
    config: dict[str, Any] = TINY | {"hidden_size": 16}
    video = on_meta(lambda: STDiT(**config)).state_dict()
    image = {name: tensor for name, tensor in video.items() if "attn_temp" not in name and "temporal" not in name}
    image["x_embedder.proj.weight"] = image["x_embedder.proj.weight"][:, :, 0]
    found = identified(image)
    assert "PixArt" in found.summary


def test_unknown_tensors_are_nothing_we_know():
    assert identify({"layer.weight": TensorInfo((3, 3), "float32")}) is None
    assert identify({}) is None


TRANSFORMERS: list[tuple[Any, dict[str, Any]]] = [
    (STDiT, {"hidden_size": 48, "num_heads": 3, "input_size": (4, 8, 8), "patch_size": (2, 2, 2)}),
    (STDiT, {"hidden_size": 16, "pred_sigma": False, "mlp_ratio": 2.5, "input_size": (3, 6, 6)}),
    (STDiT2, {"qk_norm": False, "depth": 3}),
    (STDiT2, {"hidden_size": 48, "num_heads": 4, "patch_size": (1, 1, 1), "in_channels": 5}),
    (STDiT3, {"qk_norm": False, "pred_sigma": False, "mlp_ratio": 4 / 3}),
    (STDiT3, {"hidden_size": 36, "num_heads": 3, "depth": 1, "caption_channels": 12, "model_max_length": 9}),
    (STDiT4, {"in_channels": 5, "num_heads": 4, "depth": 1}),
    (STDiT4, {"kernel_size": None, "use_spatial_rope": False}),
]


@pytest.mark.parametrize(("cls", "changes"), TRANSFORMERS)
def test_a_transformer_built_from_what_was_found_fits(cls, changes):
    wanted = TINY | changes
    network = on_meta(lambda: cls(**wanted))
    found = identified(network.state_dict())
    assert (found.library, found.class_name) == (cls.__module__, cls.__name__)
    known = {name: list(value) if isinstance(value, tuple) else value for name, value in wanted.items()}
    untold = {"num_heads"} if cls is STDiT else set()
    assert {name: found.config.get(name) for name in set(known) - untold} == {
        name: known[name] for name in set(known) - untold
    }
    assert untold <= set(found.unsure)
    rebuilt = on_meta(lambda: cls(**found.config, **{name: wanted[name] for name in untold}))
    assert shapes(rebuilt) == shapes(network)


def test_what_shapes_cannot_tell_is_said():
    told = {cls: identified(build(cls, in_channels=4).state_dict()) for cls in (STDiT, STDiT2, STDiT3)}
    assert {"num_heads", "space_scale", "time_scale"} <= set(told[STDiT].unsure)
    assert {"qk_norm_legacy", "input_sq_size"} <= set(told[STDiT2].unsure)
    assert "input_sq_size" in told[STDiT3].unsure and "qk_norm_legacy" not in told[STDiT3].unsure
    for found in told.values():
        assert not set(found.unsure) & set(found.config)


@pytest.mark.parametrize(
    "options",
    [
        {"spatial": {"block_out_channels": [8, 16], "layers_per_block": 2}},
        {
            "spatial": {"block_out_channels": [8, 8, 16], "use_quant_conv": False, "mid_block_add_attention": False},
            "spatial_patch_size": 2,
            "temporal": {"type": "folded", "dim": 12, "encoder_depth": 0, "decoder_depth": 2, "temporal_factor": 2},
        },
        {
            "spatial": {"block_out_channels": [8], "latent_channels": 6, "use_post_quant_conv": False},
            "temporal": {
                "type": "causal3d",
                "in_channels": 6,
                "latent_channels": 3,
                "filters": 8,
                "num_res_blocks": 1,
                "channel_multipliers": [1, 3],
                "temporal_downsample": [True],
            },
        },
    ],
)
def test_an_autoencoder_built_from_what_was_found_fits(options):
    options["spatial"]["norm_num_groups"] = 4
    if options.get("temporal", {}).get("type") == "causal3d":
        options["temporal"]["num_groups"] = 4
    network = on_meta(lambda: VideoAutoencoder(**options))
    found = identified(network.state_dict())
    assert "spatial.norm_num_groups" in found.unsure and "latent_space.scaling_factor" in found.unsure
    found.config["spatial"]["norm_num_groups"] = 4
    if "temporal.num_groups" in found.unsure:
        found.config["temporal"]["num_groups"] = 4
    assert shapes(on_meta(lambda: VideoAutoencoder(**found.config))) == shapes(network)


def test_autoencoders_of_diffusers():
    config = {"block_out_channels": [32, 64], "layers_per_block": 2, "latent_channels": 3}
    config["down_block_types"] = ["DownEncoderBlock2D"] * 2
    network = on_meta(lambda: AutoencoderKLTemporalDecoder(**config))
    found = identified(network.state_dict())
    assert found.class_name == "AutoencoderKLTemporalDecoder"
    assert config.items() <= found.config.items()
    assert shapes(on_meta(lambda: AutoencoderKLTemporalDecoder(**found.config))) == shapes(network)


def test_our_autoencoder_with_a_temporal_decoder():
    spatial = {"block_out_channels": [32, 64], "layers_per_block": 2}
    network = on_meta(lambda: VideoAutoencoder(spatial=spatial, temporal_decoder={}))
    found = identified(network.state_dict())
    assert "temporal decoder" in found.summary
    assert shapes(on_meta(lambda: VideoAutoencoder(**found.config))) == shapes(network)


@pytest.mark.parametrize("projection", ["relu", "gated-gelu"])
def test_text_encoders(projection):
    options: dict[str, Any] = {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 3, "num_heads": 5, "vocab_size": 30}
    config = T5Config(**options, feed_forward_proj=projection)
    encoder = on_meta(lambda: T5EncoderModel(config))
    found = identified(encoder.state_dict())
    assert (found.library, found.class_name) == ("transformers", "T5EncoderModel")
    assert {**options, "feed_forward_proj": projection}.items() <= found.config.items()
    assert shapes(on_meta(lambda: T5EncoderModel(T5Config(**found.config)))) == shapes(encoder)
    whole = identified(on_meta(lambda: T5ForConditionalGeneration(config)).state_dict())
    assert whole.config == found.config and "decoder" in whole.summary


def test_missing_tensors_leave_keywords_open_rather_than_guessed():
    state = build(STDiT3, qk_norm=False).state_dict()
    del state["y_embedder.y_embedding"], state["rope.freqs"]
    found = identified(state)
    assert not {"model_max_length", "num_heads"} & set(found.config)
    assert {"model_max_length", "num_heads"} <= set(found.unsure)
    assert found.config["caption_channels"] == TINY["caption_channels"]


# --- headers ----------------------------------------------------------------------------------------------------------


WEIGHTS = {"a.weight": torch.zeros(2, 3, dtype=torch.bfloat16), "b": torch.zeros((), dtype=torch.int64)}
HEADER = {"a.weight": TensorInfo((2, 3), "bfloat16"), "b": TensorInfo((), "int64")}


def test_headers_of_every_format(tmp_path):
    save_file(WEIGHTS, tmp_path / "x.safetensors")
    torch.save(WEIGHTS, tmp_path / "x.pth")
    torch.save(WEIGHTS, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    for name in ("x.safetensors", "x.pth", "old.ckpt"):
        assert read_header(tmp_path / name) == HEADER
    with pytest.raises(OpenSoraError, match="several files of weights"):
        (tmp_path / "x.safetensors").unlink()
        read_header(tmp_path)


@pytest.mark.parametrize("index", ["diffusion_pytorch_model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_headers_of_shards(tmp_path, index):
    ending = index.split(".")[1]
    folder = tmp_path / "model"
    folder.mkdir()
    for name, tensor in WEIGHTS.items():
        part = {name: tensor}
        save_file(part, folder / f"{name}.safetensors") if ending == "safetensors" else torch.save(
            part, folder / f"{name}.bin"
        )
    (folder / index).write_text(json.dumps({"weight_map": {n: f"{n}.{ending}" for n in WEIGHTS}}))
    assert read_header(folder) == HEADER
    assert read_header(tmp_path) == HEADER, "weights of a training run lie in its subfolder model"
    (folder / f"b.{ending}").unlink()
    with pytest.raises(OpenSoraError, match="missing"):
        read_header(folder)


def test_the_moving_average_is_taken_out_of_a_training_checkpoint(tmp_path):
    ours = {f"module.{name}": tensor for name, tensor in WEIGHTS.items()}
    torch.save({"model": {"other": torch.zeros(1)}, "ema": ours, "epoch": 3}, tmp_path / "x.pt")
    assert read_header(tmp_path / "x.pt") == HEADER


def test_the_toybox_is_recognised_in_its_own_folder(tmp_path):
    make_autoencoder().save_pretrained(tmp_path)
    found = identified(read_header(tmp_path))
    assert found.class_name == "VideoAutoencoder"
    assert found.config["temporal"]["type"] == "folded" and found.config["spatial_patch_size"] == 4


def test_damaged_files(tmp_path):
    for name in ("x.safetensors", "x.pth"):
        path = tmp_path / name
        save_file(WEIGHTS, path) if name.endswith("safetensors") else torch.save(WEIGHTS, path)
        path.write_bytes(path.read_bytes()[:-5])
        with pytest.raises(OpenSoraError, match="damaged") as error:
            read_header(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    code = Exploit(tmp_path / "made")
    torch.save({"a.weight": torch.zeros(1), "code": code}, tmp_path / "x.pt")
    (tmp_path / "y.bin").write_bytes(pickle.dumps(code))
    for name in ("x.pt", "y.bin"):
        with pytest.raises(OpenSoraError, match="refused"):
            read_header(tmp_path / name)
    assert not (tmp_path / "made").exists()


def test_nothing_to_read(tmp_path):
    with pytest.raises(OpenSoraError, match="holds no weights"):
        read_header(tmp_path)
    with pytest.raises(OpenSoraError, match="missing"):
        read_header(tmp_path / "absent.pth")
    torch.save({"epoch": 3}, tmp_path / "x.pth")
    with pytest.raises(OpenSoraError, match="state dict"):
        read_header(tmp_path)
