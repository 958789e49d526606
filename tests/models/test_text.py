"""Prompts, encoded text and the null text."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from opensora.errors import OpenSoraError
from opensora.models.text.conditioner import T5Conditioner, TextStates
from opensora.models.text.prompts import as_prompt_list, as_prompt_lists
from opensora.models.text.tokens import check_words
from opensora.toybox.captions import build_tokenizer

LENGTH = 24


def encode(tokenizer, text_encoder, prompts: list[str]) -> TextStates:
    network = SimpleNamespace(max_text_tokens=LENGTH)
    return T5Conditioner({"tokenizer": tokenizer, "text_encoder": text_encoder}, network).encode(prompts)


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
    text = encode(tokenizer, text_encoder, ["a red ball", "a small blue square spins"])
    states, mask = text.states, text.mask
    assert states.shape == (2, LENGTH, 16)
    assert mask.dtype == torch.bool
    assert mask.sum(dim=1).tolist() == [4, 6]  # words and the end token
    alone = tokenizer("a red ball", return_tensors="pt")
    expected = text_encoder(input_ids=alone["input_ids"], attention_mask=alone["attention_mask"]).last_hidden_state
    torch.testing.assert_close(states[0, :4], expected[0])


@torch.no_grad()
def test_a_prompt_is_encoded_alike_in_any_company(tokenizer, text_encoder):
    together = encode(tokenizer, text_encoder, ["a red ball", "a small blue square spins"])
    alone = encode(tokenizer, text_encoder, ["a small blue square spins"])
    torch.testing.assert_close(together.states[1:], alone.states, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_dtype_is_that_asked_for(tokenizer, text_encoder):
    text = encode(tokenizer, text_encoder, ["a ball"]).to("cpu", torch.bfloat16)
    assert text.states.dtype == torch.bfloat16
    assert text.mask is not None and text.mask.dtype == torch.bool


def test_a_prompt_that_is_too_long_is_refused(tokenizer, text_encoder):
    with pytest.raises(OpenSoraError, match=r"has 31 tokens, but this model reads 24"):
        encode(tokenizer, text_encoder, ["a ball", " ".join(["ball"] * 30)])


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
        encode(tokenizer, text_encoder, prompts)


@torch.no_grad()
def test_punctuation_and_capitals_are_no_words(tokenizer, text_encoder):
    odd = encode(tokenizer, text_encoder, ["A  red, BALL!"])
    plain = encode(tokenizer, text_encoder, ["a red ball"])
    assert torch.equal(odd.states, plain.states)


def test_a_tokenizer_of_pieces_reads_any_word():
    pieces = Tokenizer(Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -1.0)], unk_id=0))
    check_words(PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="<unk>"), ["abzebra", "!!!"])


def test_unconditional_text_is_dropped_and_keeps_the_prompts_mask():
    """A prompt of 7 tokens stands opposite to 7 tokens of the null text, which the network puts in itself."""
    mask = torch.arange(LENGTH).expand(3, -1) < torch.tensor([[3], [7], [1]])
    text = TextStates(torch.randn(3, LENGTH, 16), mask)
    null = T5Conditioner({}, None).unconditional(text)
    assert null.dropped is not None and null.dropped.all()
    assert torch.equal(null.inputs()["encoder_attention_mask"], mask)
    both = TextStates.cat([text, null])
    assert both.dropped is not None and both.dropped.tolist() == [False] * 3 + [True] * 3


def test_texts_without_a_mask_are_all_tokens_beside_others():
    some = TextStates(torch.zeros(1, 4, 2), torch.tensor([[True, True, False, False]]))
    both = TextStates.cat([TextStates(torch.zeros(1, 4, 2)), some])
    assert both.mask is not None and both.mask.sum(dim=1).tolist() == [4, 2]
    assert both.repeat_each(2).mask.sum(dim=1).tolist() == [4, 4, 2, 2]
    with pytest.raises(OpenSoraError, match="pooled"):
        TextStates.cat([some, TextStates(torch.zeros(1, 4, 2), pooled=torch.zeros(1, 3))])


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
    assert as_prompt_lists(["a", "b"], None, 2) == (["a", "b"], None)
    assert as_prompt_lists(["a", "b"], "n", 2) == (["a", "b"], ["n"] * 2)
    assert as_prompt_lists(["a", "b"], ["n", "m"], 2) == (["a", "b"], ["n", "m"])
    assert as_prompt_lists("a", " ", 1) == as_prompt_lists("a", [""], 1) == (["a"], None)


def test_impossible_pairs_are_refused():
    with pytest.raises(OpenSoraError, match="3 negative prompts for 2 prompts"):
        as_prompt_lists(["a", "b"], ["n", "m", "o"], 1)
    with pytest.raises(OpenSoraError, match="negative_prompt at position 1 is empty"):
        as_prompt_lists(["a", "b"], ["blurry", " "], 1)
    for count in (0, -1, 1.5, True):
        with pytest.raises(OpenSoraError, match="num_videos_per_prompt"):
            as_prompt_lists("a", None, count)  # type: ignore[arg-type]
