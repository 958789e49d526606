"""`opensora inspect`: good checkpoints are described, wrong ones are called by what is wrong with them."""

import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from exploit import Exploit
from safetensors.torch import load_file, save_file
from tiny_pipeline import make_autoencoder, make_pipeline
from tiny_transformers import build
from transformers import T5Config, T5EncoderModel

from opensora.checkpoints.published import PUBLISHED
from opensora.cli.main import main
from opensora.models.autoencoders.video import VideoAutoencoder
from opensora.models.schedulers.iddpm import IDDPMScheduler
from opensora.models.schedulers.rectified_flow import RectifiedFlowScheduler
from opensora.models.stdit2 import STDiT2
from opensora.models.stdit3 import STDiT3
from opensora.toybox.captions import build_tokenizer
from opensora.weights import fingerprint

WEIGHTS = "diffusion_pytorch_model.safetensors"
SD_VAE = PUBLISHED["opensora-1.1-stage3"].autoencoder.config
VAE_1_2 = PUBLISHED["opensora-1.2"].autoencoder.config


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    """A good model that knows what it was trained on."""
    folder = tmp_path_factory.mktemp("inspected") / "good"
    pipeline = make_pipeline()
    record = {
        "latent_space": pipeline.autoencoder.latent_space.to_dict(),
        "autoencoder": fingerprint(pipeline.autoencoder.state_dict()),
    }
    make_pipeline(trained_on=record).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def inspect(capsys, *args: Any) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["inspect", *map(str, args)])
    out, err = capsys.readouterr()
    return code, out, err


def problem(capsys, *args: Any) -> str:
    """The one-line error, which also stands in the report."""
    code, _, err = inspect(capsys, *args)
    assert code == 2 and err.count("\n") == 1 and err.startswith("opensora: ")
    return err


def change_json(path: Path, change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def set_latent_space(path: Path, **values) -> None:
    change_json(path, lambda config: config["latent_space"].update(values))


def published_weights(path: Path, config: Mapping[str, Any], cls: Any) -> None:
    """A component of full size without a byte of data on disk: a header, and a hole where the weights would be."""
    with torch.device("meta"):
        network = cls(**config)
    network.save_config(path)
    header, offset = {}, 0
    for name, tensor in network.state_dict().items():
        end = offset + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with (path / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
        if isinstance(network, VideoAutoencoder):  # a hole reads as zeros, which are no scale
            values = network.latent_space.statistics(network.latent_channels)
            for name, tensor in zip(("shift", "scale"), values, strict=True):
                file.seek(8 + len(text) + header[name]["data_offsets"][0])
                file.write(tensor.bfloat16().flatten().view(torch.uint8).numpy().tobytes())


# --- good ones --------------------------------------------------------------------------------------------------------


def test_a_good_model_is_described(capsys, saved):
    code, out, err = inspect(capsys, saved)
    assert (code, err) == (0, "")
    for said in (
        "5 frames of 24x16 at 8 fps",
        "4 steps, guidance 3 on all latent channels",
        "RectifiedFlowScheduler",
        "transformer of Open-Sora 1.2 (STDiT3)",
        "safetensors, one file, float32",
        "hidden_size=48",
        "tokens of width 16",
        "shift 0.1 -0.2 0.3 0",
        "T5EncoderModel",
        "all finite",
        "nothing is wrong",
    ):
        assert said in out
    assert len(out.splitlines()) < 40


def test_bundled_models_are_good(capsys):
    code, out, _ = inspect(capsys, "toybox-iddpm", "--quick")
    assert code == 0 and "the first 3 latent channels" in out and "IDDPMScheduler" in out
    assert str(Path("toybox") / "autoencoder") in out, "its autoencoder is toybox's"


def test_json_says_the_same(capsys, saved):
    code, out, _ = inspect(capsys, saved, "--json")
    report = json.loads(out)
    assert code == 0 and report["problems"] == []
    transformer = report["components"]["transformer"]
    assert transformer["class_name"] == "STDiT3" and transformer["non_finite"] == []
    assert transformer["num_parameters"] == sum(
        tensor.numel() for tensor in load_file(saved / "transformer" / WEIGHTS).values()
    )
    assert report["components"]["autoencoder"]["latent_space"]["scale"] == [2.0, 1.5, 1.25, 1.0]
    from opensora.checkpoints.source import ModelSource

    assert report["sha256"] == ModelSource.find(saved).hash()


def test_a_lone_file(capsys, tmp_path):
    import hashlib

    path = tmp_path / "ema.pt"
    network = build(STDiT2, in_channels=4, qk_norm=True)
    torch.save({"ema": {f"module.{name}": tensor.half() for name, tensor in network.state_dict().items()}}, path)
    code, out, _ = inspect(capsys, path)
    assert code == 0
    for said in ("transformer of Open-Sora 1.1 (STDiT2)", "pickle, read as tensors only", "float16", "depth=2"):
        assert said in out
    assert hashlib.sha256(path.read_bytes()).hexdigest() in out
    assert "qk_norm_legacy: shapes do not tell" in out and "input_sq_size: shapes do not tell" in out


def test_other_networks_are_named_though_they_cannot_be_run(capsys, tmp_path):
    save_file({"blocks.0.adaLN_modulation.x": torch.zeros(1), "temp_embed": torch.zeros(1)}, tmp_path / "x.safetensors")
    code, out, _ = inspect(capsys, tmp_path / "x.safetensors")
    assert code == 0 and "Latte video transformer, known but not supported yet" in out
    save_file({"a": torch.zeros(1)}, tmp_path / "y.safetensors")
    code, out, _ = inspect(capsys, tmp_path / "y.safetensors")
    assert code == 0 and "unknown network" in out


def test_a_published_model_is_recognised_by_its_shape(capsys, tmp_path):
    published_weights(tmp_path, PUBLISHED["opensora-1.1-stage3"].transformer.config, STDiT2)
    code, out, _ = inspect(capsys, tmp_path, "--quick")
    assert code == 0 and "opensora-1.1-stage2, opensora-1.1-stage3" in out and "200 tokens of width 4096" in out


def test_a_model_without_a_record_is_not_called_wrong(capsys, tmp_path):
    make_pipeline("iddpm").save_pretrained(tmp_path)
    code, out, _ = inspect(capsys, tmp_path)
    assert code == 0 and "nobody knows" in out and "guidance 3 on the first 3 latent channels" in out


# --- the wrong autoencoder --------------------------------------------------------------------------------------------


def test_another_autoencoder_of_the_same_latent_space(capsys, folder):
    other = make_autoencoder()
    with torch.no_grad():
        other.spatial_vae.module.decoder.conv_out.bias.add_(0.01)  # type: ignore[union-attr]
    other.save_pretrained(folder / "autoencoder")
    assert "wrong autoencoder: its weights have the fingerprint" in problem(capsys, folder)
    assert inspect(capsys, folder, "--quick")[0] == 0, "that takes reading the weights"


def test_a_record_that_is_none(capsys, folder):
    change_json(folder / "model_index.json", lambda index: index["trained_on"].update(latent_space={"factor": 1}))
    assert "unknown field factor" in problem(capsys, folder)


def test_another_autoencoder_of_another_latent_space(capsys, folder):
    other = make_autoencoder()
    other.set_latent_space(type(other.latent_space)(shift=(0.0,) * 4, scale=(1.0,) * 4, trained_with="another run"))
    other.save_pretrained(folder / "autoencoder")
    said = problem(capsys, folder, "--quick")
    assert "wrong autoencoder: its shift and scale" in said and "put in the one" in said


def test_an_autoencoder_of_other_channels(capsys, folder):
    spatial = {"block_out_channels": [8, 8], "latent_channels": 3, "norm_num_groups": 4}
    other = VideoAutoencoder(spatial=spatial, spatial_patch_size=4)
    other.save_pretrained(folder / "autoencoder")
    change_json(folder / "model_index.json", lambda index: index.pop("trained_on"))
    assert "works on 4 latent channels, the autoencoder makes 3" in problem(capsys, folder)


@pytest.fixture
def full_size(folder) -> Path:
    """A folder with the text encoder of the published models, and no record of training."""
    change_json(folder / "model_index.json", lambda index: index.pop("trained_on"))
    config = T5Config(vocab_size=len(build_tokenizer()), d_model=4096, d_kv=1, d_ff=1, num_layers=1, num_heads=1)
    T5EncoderModel(config).save_pretrained(folder / "text_encoder")
    return folder


def test_the_transformer_of_1_2_without_the_part_over_time(capsys, full_size):
    """The Stable Diffusion autoencoder, or SDXL's, alone."""
    published_weights(full_size / "transformer", PUBLISHED["opensora-1.2"].transformer.config, STDiT3)
    published_weights(full_size / "autoencoder", SD_VAE, VideoAutoencoder)
    RectifiedFlowScheduler().save_pretrained(full_size / "scheduler")
    said = problem(capsys, full_size, "--quick")
    assert "no part over time" in said and "hpcai-tech/OpenSora-VAE-v1.2" in said

    shutil.rmtree(full_size / "autoencoder")
    published_weights(full_size / "autoencoder", VAE_1_2, VideoAutoencoder)
    code, out, err = inspect(capsys, full_size, "--quick")
    assert (code, err) == (0, "") and "shaped like" in out


def test_the_transformer_of_1_1_with_the_sdxl_autoencoder(capsys, full_size):
    published_weights(full_size / "transformer", PUBLISHED["opensora-1.1-stage3"].transformer.config, STDiT2)
    index = {"transformer": ["opensora.models.stdit2", "STDiT2"]}
    index["scheduler"] = ["opensora.models.schedulers.iddpm", "IDDPMScheduler"]
    change_json(full_size / "model_index.json", lambda values: values.update(index))
    shutil.rmtree(full_size / "scheduler")
    IDDPMScheduler().save_pretrained(full_size / "scheduler")
    sdxl = {**SD_VAE, "latent_space": {"scaling_factor": 0.13025}}
    published_weights(full_size / "autoencoder", sdxl, VideoAutoencoder)
    said = problem(capsys, full_size, "--quick")
    assert "wrong scaling factor or wrong autoencoder: 0.13025 (multiply)" in said and "0.18215" in said
    set_latent_space(full_size / "autoencoder" / "config.json", scaling_factor=0.18215)
    code, _, err = inspect(capsys, full_size, "--quick")
    assert (code, err) == (0, "")


# --- a wrong scaling factor -------------------------------------------------------------------------------------------


def test_a_scaling_factor_other_than_in_training(capsys, folder):
    set_latent_space(folder / "autoencoder" / "config.json", scaling_factor=0.13025)
    said = problem(capsys, folder)
    assert "wrong scaling factor or wrong autoencoder: 0.13025 (multiply) in the autoencoder, 1 (multiply)" in said
    assert "set latent_space.scaling_factor to 1 in its config.json" in said


def test_the_right_number_under_the_wrong_convention(capsys, folder):
    def trained(index):
        index["trained_on"] = {"latent_space": index["trained_on"]["latent_space"] | {"scaling_factor": 0.18215}}

    change_json(folder / "model_index.json", trained)
    set_latent_space(folder / "autoencoder" / "config.json", scaling_factor=0.18215, convention="divide")
    assert 'set latent_space.convention to "multiply", the number is right' in problem(capsys, folder)
    set_latent_space(folder / "autoencoder" / "config.json", scaling_factor=1 / 0.18215)
    code, _, err = inspect(capsys, folder)
    assert (code, err) == (0, ""), "the same factor, written the other way"


def test_the_published_autoencoder_with_the_factor_of_its_2d_part(capsys, tmp_path):
    """Shift and scale in the weights give it away, whatever it is a part of."""
    config: dict[str, Any] = {
        "spatial": {"block_out_channels": [8, 8], "norm_num_groups": 4},
        "temporal": {"type": "folded", "dim": 8, "encoder_depth": 1, "decoder_depth": 1},
        "latent_space": VAE_1_2["latent_space"],
    }
    VideoAutoencoder(**config).save_pretrained(tmp_path)
    assert inspect(capsys, tmp_path)[0] == 0
    set_latent_space(tmp_path / "config.json", scaling_factor=0.13025)
    said = problem(capsys, tmp_path)
    assert "wrong scaling factor" in said and "0.18215 (multiply), not 0.13025 (multiply)" in said
    assert "set latent_space.scaling_factor to 0.18215" in said


def test_a_configuration_that_contradicts_the_weights(capsys, folder):
    set_latent_space(folder / "autoencoder" / "config.json", shift=[0.5, 0.5, 0.5, 0.5])
    assert "shift is [0.5, 0.5, 0.5, 0.5] in the configuration but" in problem(capsys, folder)


def test_an_override_is_told_and_not_called_wrong(capsys, folder):
    path = folder / "autoencoder" / "config.json"
    replaced = json.loads(path.read_text())["latent_space"]
    set_latent_space(path, scaling_factor=0.5, replaces=replaced)
    code, out, _ = inspect(capsys, folder)
    assert code == 0 and "a user's, in place of scaling factor 1 (multiply)" in out


# --- other parts that do not fit --------------------------------------------------------------------------------------


def test_a_text_encoder_of_another_width(capsys, folder):
    T5EncoderModel(T5Config(vocab_size=400, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(
        folder / "text_encoder"
    )
    assert "wrong text encoder: the transformer reads text states of width 16, it makes 8" in problem(capsys, folder)


def test_a_tokenizer_of_another_vocabulary(capsys, folder):
    T5EncoderModel(T5Config(vocab_size=9, d_model=16, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(
        folder / "text_encoder"
    )
    assert "wrong tokenizer" in problem(capsys, folder)


def test_a_time_shift_for_another_autoencoder(capsys, folder):
    RectifiedFlowScheduler(use_timestep_transform=True, temporal_factor=1).save_pretrained(folder / "scheduler")
    assert "temporal_factor" in problem(capsys, folder)


def test_a_learned_variance_that_nobody_predicts(capsys, folder):
    from tiny_pipeline import TEXT_WIDTH

    build(STDiT3, in_channels=4, caption_channels=TEXT_WIDTH, pred_sigma=False).save_pretrained(folder / "transformer")
    index = {"scheduler": ["opensora.models.schedulers.iddpm", "IDDPMScheduler"]}
    change_json(folder / "model_index.json", lambda values: values.update(index))
    IDDPMScheduler().save_pretrained(folder / "scheduler")
    assert "learned variance" in problem(capsys, folder)


def test_an_option_that_does_not_exist(capsys, folder):
    change_json(folder / "model_index.json", lambda index: index.update(guidance_skale=3.0))
    assert "guidance_skale" in problem(capsys, folder)


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_truncated_file(capsys, folder):
    path = folder / "transformer" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    said = problem(capsys, path)
    assert str(path) in said and "damaged" in said
    code, out, err = inspect(capsys, folder)
    assert code == 2 and str(path) in err and "damaged" in err
    assert "T5EncoderModel" in out, "the other parts are reported all the same"


def test_a_pickle_with_code(capsys, folder, tmp_path):
    path = folder / "transformer" / "diffusion_pytorch_model.bin"
    torch.save({"x": torch.zeros(1), "code": Exploit(tmp_path / "made")}, path)
    assert "refused" in problem(capsys, path)
    (folder / "transformer" / WEIGHTS).unlink()
    assert "refused" in problem(capsys, folder)
    assert not (tmp_path / "made").exists()


def test_an_empty_folder(capsys, tmp_path):
    said = problem(capsys, tmp_path)
    assert str(tmp_path) in said and "holds no weights" in said


def test_a_missing_component(capsys, folder):
    shutil.rmtree(folder / "text_encoder")
    assert "text_encoder is missing" in problem(capsys, folder)


def test_a_component_without_its_configuration(capsys, folder):
    (folder / "transformer" / "config.json").unlink()
    assert "transformer/config.json is missing" in problem(capsys, folder)


@pytest.mark.parametrize(
    ("defaults", "why"),
    [
        ({"num_frames": 0}, "num_frames 0"),
        ({"max_frames": 1}, "more than this model can make"),
        ({"cfg_channels": 99}, "cfg_channels=99"),
        ({"scores": 7}, "scores is the number 7"),
        ({"scores": {"aesthetic": "x"}}, "aesthetic score is x"),
        ({"guidance_options": [1]}, "guidance_options is a list"),
    ],
)
def test_defaults_that_it_cannot_sample_with(capsys, folder, defaults, why):
    change_json(folder / "model_index.json", lambda index: index.update(defaults))
    assert why in problem(capsys, folder, "--quick")


def test_whole_numbers_for_weights(capsys, folder):
    path = folder / "transformer" / WEIGHTS
    coded = {name: tensor.to(torch.int8) for name, tensor in load_file(path).items()}
    save_file(coded, path)
    assert "hold int8, quantised in a way that is not read" in problem(capsys, path)
    assert "hold int8, quantised in a way that is not read" in problem(capsys, folder)


def test_an_unknown_name(capsys):
    assert "did you mean 'toybox'?" in problem(capsys, "toybocks")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(capsys, folder, value):
    path = folder / "transformer" / WEIGHTS
    weights = load_file(path)
    weights["final_layer.linear.weight"][0, 0] = value
    save_file(weights, path)
    said = problem(capsys, folder)
    assert "NaN or infinite values in final_layer.linear.weight" in said
    assert inspect(capsys, folder, "--quick")[0] == 0, "that takes reading the data"


def test_weights_of_another_configuration(capsys, folder):
    change_json(folder / "transformer" / "config.json", lambda config: config.update(depth=3))
    said = problem(capsys, folder)
    assert "missing tensors (spatial_blocks.2." in said and "two different models" in said
    change_json(folder / "transformer" / "config.json", lambda config: config.update(depth=1))
    assert "unexpected tensors (spatial_blocks.1." in problem(capsys, folder)
    change_json(folder / "transformer" / "config.json", lambda config: config.update(depth=2, mlp_ratio=2.0))
    assert "mis-shaped tensors" in problem(capsys, folder / "transformer")
