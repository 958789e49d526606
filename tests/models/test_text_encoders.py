"""Prompts, encoded text and the null text."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from opensora.errors import OpenSoraError
from opensora.models.text.encoders import check_words, encode_prompts, null_prompts
from opensora.models.text.prompts import as_prompt_list, pair_prompts
from opensora.toybox.captions import build_tokenizer

LENGTH = 24


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def text_encoder(tokenizer):
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return T5EncoderModel(config).eval()


@torch.no_grad()
def test_states_have_the_last_hidden_state_where_the_mask_says_text(tokenizer, text_encoder):
    states, mask = encode_prompts(tokenizer, text_encoder, ["a red ball", "a small blue square spins"], LENGTH)
    assert states.shape == (2, LENGTH, 16)
    assert mask.dtype == torch.bool
    assert mask.sum(dim=1).tolist() == [4, 6]  # words and the end token
    alone = tokenizer("a red ball", return_tensors="pt")
    expected = text_encoder(input_ids=alone["input_ids"], attention_mask=alone["attention_mask"]).last_hidden_state
    torch.testing.assert_close(states[0, :4], expected[0])


@torch.no_grad()
def test_a_prompt_is_encoded_alike_in_any_company(tokenizer, text_encoder):
    together, _ = encode_prompts(tokenizer, text_encoder, ["a red ball", "a small blue square spins"], LENGTH)
    alone, _ = encode_prompts(tokenizer, text_encoder, ["a small blue square spins"], LENGTH)
    torch.testing.assert_close(together[1:], alone, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_dtype_is_that_asked_for(tokenizer, text_encoder):
    states, mask = encode_prompts(tokenizer, text_encoder, ["a ball"], LENGTH, device="cpu", dtype=torch.bfloat16)
    assert states.dtype == torch.bfloat16
    assert mask.dtype == torch.bool


def test_a_prompt_that_is_too_long_is_refused(tokenizer, text_encoder):
    with pytest.raises(OpenSoraError, match=r"has 31 tokens, but this model reads 24"):
        encode_prompts(tokenizer, text_encoder, ["a ball", " ".join(["ball"] * 30)], LENGTH)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a zebra eats a red Zebra"], "does not know: zebra, eats, Zebra$"),
        (["a red ball", "un été, zebra!"], "does not know: un, été, zebra$"),
        (["a <unk> ball"], "does not know: <unk>$"),
        (["!!!"], "the prompt '!!!' holds no word"),
        (["a ball", "🦓"], "the prompt '🦓' holds no word"),
    ],
)
def test_words_that_no_token_stands_for_are_named(tokenizer, text_encoder, prompts, message):
    with pytest.raises(OpenSoraError, match=message):
        encode_prompts(tokenizer, text_encoder, prompts, LENGTH)


@torch.no_grad()
def test_punctuation_and_capitals_are_no_words(tokenizer, text_encoder):
    odd, _ = encode_prompts(tokenizer, text_encoder, ["A  red, BALL!"], LENGTH)
    plain, _ = encode_prompts(tokenizer, text_encoder, ["a red ball"], LENGTH)
    assert torch.equal(odd, plain)


def test_a_tokenizer_of_pieces_reads_any_word():
    pieces = Tokenizer(Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -1.0)], unk_id=0))
    check_words(PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="<unk>"), ["abzebra", "!!!"])


def test_null_rows_repeat_the_embedding_and_keep_the_prompts_mask():
    null_text = torch.randn(LENGTH, 16)
    mask = torch.arange(LENGTH).expand(3, -1) < torch.tensor([[3], [7], [1]])
    states, null_mask = null_prompts(null_text, mask)
    assert all(torch.equal(row, null_text) for row in states)
    assert torch.equal(null_mask, mask)
    with pytest.raises(OpenSoraError, match="max_length=24"):
        null_prompts(null_text, mask[:, :5])


def test_prompts_become_a_list():
    assert as_prompt_list(" a ball ") == ["a ball"]
    assert as_prompt_list(["a ball", "a ring"]) == ["a ball", "a ring"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt is empty"),
        ("  \n", "prompt is empty"),
        (["a ball", ""], "prompt at position 1 is empty"),
        ([], "empty list"),
        (3, "expected a sentence"),
        ([3], "expected a sentence"),
    ],
)
def test_what_is_no_prompt_is_refused(prompt, message):
    with pytest.raises(OpenSoraError, match=message):
        as_prompt_list(prompt)


def test_prompts_and_negative_prompts_are_repeated_per_video():
    assert pair_prompts(["a", "b"], None, 2) == (["a", "a", "b", "b"], None)
    assert pair_prompts(["a", "b"], "n", 2) == (["a", "a", "b", "b"], ["n"] * 4)
    assert pair_prompts(["a", "b"], ["n", "m"], 2) == (["a", "a", "b", "b"], ["n", "n", "m", "m"])


def test_impossible_pairs_are_refused():
    with pytest.raises(OpenSoraError, match="3 negative prompts for 2 prompts"):
        pair_prompts(["a", "b"], ["n", "m", "o"], 1)
    with pytest.raises(OpenSoraError, match="negative_prompt is empty"):
        pair_prompts("a", "", 1)
    for count in (0, -1, 1.5, True):
        with pytest.raises(OpenSoraError, match="num_videos_per_prompt"):
            pair_prompts("a", None, count)  # type: ignore[arg-type]
