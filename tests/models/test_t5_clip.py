"""Text of two encoders: states of T5 with its padding, and one vector of CLIP."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from opensora.checkpoints.components import load_component
from opensora.checkpoints.key_maps import find_config
from opensora.errors import OpenSoraError
from opensora.models.identify import identify
from opensora.models.text.t5_clip import T5ClipConditioner
from opensora.toybox.captions import build_tokenizer

LENGTH, CLIP_LENGTH = 9, 5
CLIP: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "max_position_embeddings": CLIP_LENGTH,
    "bos_token_id": 3,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
NETWORK = SimpleNamespace(max_text_tokens=LENGTH, config=SimpleNamespace(caption_channels=16, pooled_channels=64))


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return {
        "text_encoder": T5EncoderModel(config).eval().requires_grad_(False),
        "tokenizer": tokenizer,
        "text_encoder_2": CLIPTextModel(CLIPTextConfig(**CLIP | {"vocab_size": len(tokenizer)}))
        .eval()
        .requires_grad_(False),
        "tokenizer_2": build_tokenizer(),
    }


def test_padding_takes_part_and_clip_gives_one_vector(parts):
    text = T5ClipConditioner(parts, NETWORK).encode(["a red ball"])
    assert text.mask is None and text.pooled is not None
    assert text.states.shape == (1, LENGTH, 16) and text.pooled.shape == (1, 64)
    padded = parts["tokenizer"](["a red ball"], padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    expected = parts["text_encoder"](input_ids=padded).last_hidden_state
    torch.testing.assert_close(text.states, expected)
    masked = parts["text_encoder"](input_ids=padded, attention_mask=(padded != 0).long()).last_hidden_state
    assert (expected - masked)[:, :4].abs().max() > 1e-3
    cut = parts["tokenizer"](
        ["a red ball"], padding="max_length", max_length=CLIP_LENGTH, return_tensors="pt"
    ).input_ids
    torch.testing.assert_close(text.pooled, parts["text_encoder_2"](input_ids=cut).pooler_output)


def test_which_is_which_their_classes_tell(parts):
    swapped = {
        "text_encoder": parts["text_encoder_2"],
        "tokenizer": parts["tokenizer_2"],
        "text_encoder_2": parts["text_encoder"],
        "tokenizer_2": parts["tokenizer"],
    }
    one, other = (T5ClipConditioner(each, NETWORK).encode(["a red ball"]) for each in (parts, swapped))
    torch.testing.assert_close(one.states, other.states)
    torch.testing.assert_close(one.pooled, other.pooled)


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_one_encoder_alone_is_refused(parts, name):
    with pytest.raises(OpenSoraError, match="reads text by a T5 encoder and a CLIP encoder"):
        T5ClipConditioner({**parts, name: None}, NETWORK).encode(["a ball"])


def test_no_text_is_the_encoding_of_an_empty_one(parts):
    conditioner = T5ClipConditioner(parts, NETWORK)
    text = conditioner.encode(["a red ball", "a blue square"])
    null, empty = conditioner.branches(text, None)["null"], conditioner.encode([""])
    for row in range(2):
        torch.testing.assert_close(null.states[row], empty.states[0])
        torch.testing.assert_close(null.pooled[row], empty.pooled[0])


def test_clip_reads_the_beginning_of_what_t5_reads_whole(parts):
    conditioner = T5ClipConditioner(parts, NETWORK)
    tokens = conditioner.tokenize(["a small red ball rolls left"])
    assert tokens.num_cut == 0 and tokens.ids["text_encoder_2"].shape == (1, CLIP_LENGTH)
    with pytest.raises(OpenSoraError, match="reads 9; shorten it"):
        conditioner.tokenize(["a small red ball rolls left and a large blue square rolls right"])


def test_plans_need_no_tokenizer(parts):
    conditioner = T5ClipConditioner({**parts, "tokenizer": None, "tokenizer_2": None}, NETWORK)
    made, blank = (
        conditioner.encode_tokens(conditioner.blank_tokens(3, "cpu")),
        conditioner.blank_states(3, "cpu", torch.float32),
    )
    assert made.states.shape == blank.states.shape
    assert made.pooled is not None and blank.pooled is not None and made.pooled.shape == blank.pooled.shape


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [True, False], ids=["published", "of today"])
def test_clip_is_recognised_and_read_from_either_names(parts, tmp_path, wrapped):
    encoder = parts["text_encoder_2"]
    weights = {f"{'text_model.' * wrapped}{name}": tensor for name, tensor in encoder.state_dict().items()}
    found = identify(weights)
    assert found is not None and found.supported and found.class_name == "CLIPTextModel"
    told = {name: getattr(encoder.config, name) for name in found.config}
    assert found.config == told and {"num_attention_heads", "hidden_act"} == set(found.unsure)
    if wrapped:  # the image encoder lies in the same file, and its configuration in the same one
        weights |= {"vision_model.a": torch.zeros(1), "logit_scale": torch.zeros(1)}
        weights["text_model.embeddings.position_ids"] = torch.arange(CLIP_LENGTH)[None]
        encoder.config.save_pretrained(tmp_path)
        stored = (tmp_path / "config.json").read_text()
        (tmp_path / "config.json").write_text(f'{{"model_type": "clip", "text_config": {stored}}}')
        save_file(weights, tmp_path / "model.safetensors")
    else:
        encoder.save_pretrained(tmp_path)
    assert find_config(tmp_path, CLIPTextModel)["hidden_size"] == 64
    loaded = load_component(tmp_path, CLIPTextModel)
    ids = torch.tensor([[3, 5, 1, 0, 0]])
    torch.testing.assert_close(loaded(input_ids=ids).pooler_output, encoder(input_ids=ids).pooler_output)
