"""The toy language: every caption in vocabulary and within the token limit, every clip's words said."""

import random

from opensora.toybox import chinese
from opensora.toybox.captions import (
    COLOUR_WORDS,
    MAX_TOKENS,
    SHAPE_WORDS,
    VERBS,
    VOCABULARY,
    build_tokenizer,
    caption,
    describe_vocabulary,
    language_of,
    participle,
    plain_caption,
    unknown_words,
    words_of,
)
from opensora.toybox.specs import EASY_WORLD, FULL_WORLD, World, sample_specs

EXAMPLE = "A small red ball rolls left over the grass."
CHINESE_EXAMPLE = "一个小红球向左滚过草地。"


def test_every_caption_is_in_vocabulary_and_fits():
    rng = random.Random(0)
    for spec in sample_specs(2000, 0, FULL_WORLD, "all"):
        worded = [plain(spec) for plain in (plain_caption, chinese.plain_caption)]
        for text in [*worded, caption(spec, rng, "en"), caption(spec, rng, "zh")]:
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


def test_chinese_captions_name_shape_and_colour_and_vary():
    rng = random.Random(1)
    for spec in sample_specs(200, 1):
        text = caption(spec, rng, "zh")
        assert any(name in text for name in chinese.SHAPE_WORDS[spec.shape]), text
        assert any(name in text for name in chinese.COLOUR_WORDS[spec.colour]), text
        assert language_of(text) == "zh" and "a" not in words_of(text)
    spec = sample_specs(1, 1)[0]
    assert len({caption(spec, rng, "zh") for _ in range(100)}) > 60


def test_plain_captions_tell_clips_apart():
    specs = sample_specs(500, 2)
    for language in ("en", "zh"):
        words = {(s.shape, s.colour, s.size, s.motion, s.background): plain_caption(s, language) for s in specs}
        assert len(set(words.values())) == len(words)


def test_no_word_means_two_things():
    tables = [SHAPE_WORDS, COLOUR_WORDS, VERBS]
    tables += [chinese.SHAPE_WORDS, chinese.COLOUR_WORDS, chinese.VERBS, chinese.PLACES]
    for table in tables:
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


def test_chinese_is_read_character_by_character():
    assert words_of("一个Red球，滚！") == ["一", "个", "red", "球", "滚"]
    for prompt in (CHINESE_EXAMPLE, "一个大的蓝色方块在沙滩上旋转", "一只小小的白色圆环在夜空中慢慢地变大"):
        assert unknown_words(prompt) == []
    assert unknown_words("一只猫和一只狗，猫") == ["猫", "狗"]
    # Made of known characters, but a model of this world was never shown one.
    assert unknown_words("一个红色的五角星", EASY_WORLD) == ["五角星"]
    assert unknown_words("一个红色的五角星在星空下", World()) == []
    assert language_of(EXAMPLE) == "en" and language_of(CHINESE_EXAMPLE) == "zh"


def test_the_vocabulary_is_small_and_described_in_one_line():
    assert len(VOCABULARY) < 400
    assert list(VOCABULARY) == sorted(set(VOCABULARY))
    line = describe_vocabulary()
    assert "\n" not in line
    assert "star" not in words_of(line)
    line = describe_vocabulary(language="zh")
    assert "\n" not in line and "五角星" not in line
    line = describe_vocabulary()
    assert not set(EASY_WORLD.shapes) - set(words_of(line))


def test_the_tokenizer_gives_one_token_a_word_and_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    build_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(EXAMPLE).input_ids)
    assert tokens == [*words_of(EXAMPLE), "</s>"]
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(CHINESE_EXAMPLE).input_ids)
    assert tokens == [*words_of(CHINESE_EXAMPLE), "</s>"]
    batch = tokenizer(["a CAT", EXAMPLE], padding="max_length", truncation=True)
    assert {len(ids) for ids in batch.input_ids} == {MAX_TOKENS}
    assert tokenizer.convert_ids_to_tokens(batch.input_ids[0])[:4] == ["a", "<unk>", "</s>", "<pad>"]
    assert sum(batch.attention_mask[0]) == 3
