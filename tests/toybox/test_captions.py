"""The toy language: every caption in vocabulary and within the token limit, every clip's words said."""

import random

from opensora.toybox.captions import (
    COLOUR_WORDS,
    MAX_TOKENS,
    SHAPE_WORDS,
    VERBS,
    VOCABULARY,
    build_tokenizer,
    caption,
    describe_vocabulary,
    participle,
    plain_caption,
    unknown_words,
    words_of,
)
from opensora.toybox.world import EASY_WORLD, FULL_WORLD, World, sample_specs

EXAMPLE = "A small red ball rolls left over the grass."


def test_every_caption_is_in_vocabulary_and_fits():
    rng = random.Random(0)
    for spec in sample_specs(2000, 0, FULL_WORLD, "all"):
        for text in (caption(spec, rng), plain_caption(spec)):
            assert not unknown_words(text, FULL_WORLD), text
            assert len(words_of(text)) + 1 <= MAX_TOKENS, text


def test_captions_name_shape_and_colour_and_vary():
    rng = random.Random(1)
    for spec in sample_specs(200, 1):
        words = set(words_of(caption(spec, rng)))
        assert words & set(SHAPE_WORDS[spec.shape])
        assert words & set(COLOUR_WORDS[spec.colour])
    spec = sample_specs(1, 1)[0]
    assert len({caption(spec, rng) for _ in range(100)}) > 80
    assert caption(spec, random.Random(3)) == caption(spec, random.Random(3))


def test_plain_captions_tell_clips_apart():
    specs = sample_specs(500, 2)
    words = {(s.shape, s.colour, s.size, s.motion, s.background): plain_caption(s) for s in specs}
    assert len(set(words.values())) == len(words)


def test_no_word_means_two_things():
    for table in (SHAPE_WORDS, COLOUR_WORDS, VERBS):
        options = [option for values in table.values() for option in set(values)]
        assert len(options) == len(set(options))


def test_participles_are_english():
    expected = {
        "rolls to the left": "rolling to the left",
        "goes up": "going up",
        "sits": "sitting",
        "spins around": "spinning around",
        "is still": "still",
        "does not move": "not moving",
        "circles": "circling",
        "gets bigger": "getting bigger",
        "stays in place": "staying in place",
        "travels left": "travelling left",
    }
    assert {verb: participle(verb) for verb in expected} == expected


def test_unknown_words_are_named_once_and_in_order():
    assert unknown_words(EXAMPLE) == []
    assert unknown_words("A cat, a DOG; the cat!") == ["cat", "dog"]
    assert unknown_words("a red star", EASY_WORLD) == ["star"]
    assert unknown_words("a red star under the stars", World()) == []
    assert unknown_words("un été") == ["un", "été"]


def test_the_vocabulary_is_small_and_described_in_one_line():
    assert len(VOCABULARY) < 300
    assert list(VOCABULARY) == sorted(set(VOCABULARY))
    line = describe_vocabulary()
    assert "\n" not in line
    assert "star" not in words_of(line)
    assert not set(EASY_WORLD.shapes) - set(words_of(line))


def test_the_tokenizer_gives_one_token_a_word_and_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    build_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(EXAMPLE).input_ids)
    assert tokens == [*words_of(EXAMPLE), "</s>"]
    batch = tokenizer(["a CAT", EXAMPLE], padding="max_length", truncation=True)
    assert {len(ids) for ids in batch.input_ids} == {MAX_TOKENS}
    assert tokenizer.convert_ids_to_tokens(batch.input_ids[0])[:4] == ["a", "<unk>", "</s>", "<pad>"]
    assert sum(batch.attention_mask[0]) == 3
