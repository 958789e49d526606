"""The toy world's language: a small grammar that words a clip in many ways, and the tokenizer for it.

Every word that a caption can contain is known beforehand, so a model of a few million parameters can learn the whole
language, and a prompt with words from outside it can be refused with the words named. The grammar here is English;
`chinese.py` has the Chinese one, of which every character counts as a word.
"""

import random
import re
from typing import TYPE_CHECKING, Literal

from opensora.toybox import chinese
from opensora.toybox.specs import EASY_WORLD, ClipSpec, Thing, World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Language = Literal["en", "zh"]

MAX_TOKENS = 24
PAD, EOS, UNK = "<pad>", "</s>", "<unk>"

ARTICLES = ("a", "a", "the", "one")
SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "big", "big", "huge", "giant")}
COLOUR_WORDS = {
    "red": ("red", "red", "crimson", "scarlet"),
    "green": ("green", "green", "emerald"),
    "blue": ("blue", "blue", "azure"),
    "yellow": ("yellow", "yellow", "golden"),
    "orange": ("orange", "orange", "tangerine"),
    "purple": ("purple", "purple", "violet"),
    "white": ("white", "white", "ivory"),
    "pink": ("pink", "pink", "rose"),
}
SHAPE_WORDS = {
    "ball": ("ball", "ball", "sphere", "circle"),
    "square": ("square", "square", "box", "block"),
    "triangle": ("triangle", "triangle", "pyramid"),
    "ring": ("ring", "ring", "hoop"),
    "cross": ("cross", "cross", "plus"),
    "star": ("star",),
}
SIDEWAYS = ("moves", "goes", "rolls", "slides", "glides", "drifts", "travels")
VERBS = {
    "still": ("stands still", "is still", "rests", "sits", "waits", "stays", "stays in place", "does not move"),
    "left": tuple(f"{verb} {way}" for verb in SIDEWAYS for way in ("left", "to the left", "leftwards")),
    "right": tuple(f"{verb} {way}" for verb in SIDEWAYS for way in ("right", "to the right", "rightwards")),
    "up": ("rises", "moves up", "goes up", "climbs", "floats up", "moves upwards", "soars", "ascends"),
    "down": ("falls", "moves down", "goes down", "sinks", "drops", "moves downwards", "descends"),
    "bounce": ("bounces", "bounces", "hops", "jumps", "bounces up and down", "jumps up and down"),
    "orbit": ("orbits", "circles", "moves in a circle", "goes round in circles", "loops", "circles around"),
    "spin": ("spins", "rotates", "turns", "twirls", "spins around", "turns around", "whirls"),
    "grow": ("grows", "gets bigger", "becomes larger", "expands", "swells", "grows bigger"),
    "shrink": ("shrinks", "gets smaller", "becomes smaller", "contracts", "dwindles"),
}
PLAIN_VERBS = {"still": "stands still", "left": "moves left", "right": "moves right", "up": "moves up"} | {
    "down": "moves down",
    "bounce": "bounces",
    "orbit": "moves in a circle",
    "spin": "spins",
    "grow": "grows",
    "shrink": "shrinks",
}
SPEED_WORDS = {"slow": ("slowly", "gently", "calmly"), "fast": ("quickly", "fast", "rapidly", "swiftly")}
PLACES = {
    "white": ("on a white background", "on plain white", "in front of a white wall"),
    "grey": ("on a grey background", "on plain gray", "in front of a grey wall", "on a gray background"),
    "wood": ("on the wood", "on a wooden floor", "over wooden planks", "on a wooden table"),
    "day": ("in the sky", "in the daytime sky", "in daylight", "by day", "among the clouds", "under a clear sky"),
    "sunset": ("at sunset", "in the evening", "at dusk", "in the sunset sky", "in the evening sky"),
    "night": ("at night", "in the night sky", "under the stars", "by night", "in the dark"),
    "grass": ("on the grass", "over the grass", "across a meadow", "on a lawn", "over a field"),
    "sand": ("on the sand", "over the sand", "on a beach", "across the desert", "over a dune"),
    "water": ("on the water", "over the water", "on the sea", "across the ocean", "over a lake", "on a pond"),
}
OPENINGS = ("", "", "", "there is", "we see", "a video of", "a clip of", "here is")


def participle(verb: str) -> str:
    """ "rolls to the left" -> "rolling to the left"."""
    first, _, rest = verb.partition(" ")
    if first == "is":
        return rest
    if verb == "does not move":
        return "not moving"
    stem = "go" if first == "goes" else first[:-1]
    if stem in ("sit", "spin", "drop", "hop", "get", "travel"):
        stem += stem[-1]
    elif stem.endswith("e"):
        stem = stem[:-1]
    return f"{stem}ing {rest}".strip()


def describe(thing: Thing, rng: random.Random, drop_size: bool) -> str:
    """ "a tiny crimson sphere"."""
    size = "" if drop_size else rng.choice(SIZE_WORDS[thing.size])
    colour, shape = rng.choice(COLOUR_WORDS[thing.colour]), rng.choice(SHAPE_WORDS[thing.shape])
    article = rng.choice(ARTICLES)
    if article == "a" and (size or colour)[0] in "aeiou":
        article = "an"
    return " ".join(word for word in (article, size, colour, shape) if word)


def caption(spec: ClipSpec, rng: random.Random, language: Language = "en", plain: float = 0.0) -> str:
    """One of many wordings of a clip; says everything but, now and then, the size, the speed or the place.

    `plain` is the share of clips that are worded as in `plain_caption`.
    """
    if plain and rng.random() < plain:
        return plain_caption(spec, language)
    if language == "zh":
        text = chinese.caption(spec, rng)
        while len(words_of(text)) >= MAX_TOKENS:
            text = chinese.caption(spec, rng)
        return text
    verb = rng.choice(VERBS[spec.motion])
    if spec.motion != "still" and rng.random() < 0.5:
        adverb = rng.choice(SPEED_WORDS[spec.speed])
        verb = f"{verb} {adverb}"
    opening = rng.choice(OPENINGS)
    if opening:
        verb = participle(verb)
    subject = describe(spec, rng, drop_size=rng.random() < 0.05)
    place = "" if rng.random() < 0.05 else rng.choice(PLACES[spec.background])
    other = f"and {describe(spec.second, rng, False)}" if spec.second else ""
    clause = [opening, subject, verb, other]
    clause = [place, *clause] if rng.random() < 0.2 else [*clause, place]
    return " ".join(part for part in clause if part)


def plain_caption(spec: ClipSpec, language: Language = "en") -> str:
    """The one canonical wording, used to evaluate: "a small red ball moves left on the grass"."""
    if language == "zh":
        return chinese.plain_caption(spec)
    things = [f"a {spec.size} {spec.colour} {spec.shape} {PLAIN_VERBS[spec.motion]}"]
    if spec.second:
        things.append(f"and a {spec.second.size} {spec.second.colour} {spec.second.shape}")
    return " ".join([*things, PLACES[spec.background][0]])


def words_of(prompt: str) -> list[str]:
    """A prompt's words, and each of its Chinese characters: lower case, punctuation dropped."""
    return re.findall(rf"{chinese.CHARACTER}|(?:(?!{chinese.CHARACTER})\w)+", prompt.lower())


def vocabulary() -> tuple[str, ...]:
    """Every word of the language in alphabetical order, then every Chinese character."""
    phrases = ["an", "and", *ARTICLES, *OPENINGS]
    for table in (SIZE_WORDS, COLOUR_WORDS, SHAPE_WORDS, VERBS, SPEED_WORDS, PLACES):
        for options in table.values():
            phrases += options
    for options in VERBS.values():
        phrases += [participle(verb) for verb in options]
    words = {word for phrase in [*phrases, *PLAIN_VERBS.values()] for word in words_of(phrase)}
    return tuple(sorted(words | chinese.CHARACTERS))


VOCABULARY = vocabulary()


def unknown_words(prompt: str, world: World = EASY_WORLD) -> list[str]:
    """The words of a prompt that a model of this world has never seen, each once, in order."""
    missing = [shape for shape in SHAPE_WORDS if shape not in world.shapes]
    known = set(VOCABULARY) - {word for shape in missing for word in SHAPE_WORDS[shape]}
    # A Chinese name of such a shape is made of characters that are known.
    names = [name for shape in missing for name in chinese.SHAPE_WORDS[shape] if name in prompt]
    return list(dict.fromkeys(names + [word for word in words_of(prompt) if word not in known]))


def describe_vocabulary(world: World = EASY_WORLD, language: Language = "en") -> str:
    """One line that tells a user what a model of this world can be asked for."""
    if language == "zh":
        return chinese.describe_vocabulary(world)
    sizes, colours, shapes = ", ".join(world.sizes), ", ".join(world.colours), ", ".join(world.shapes)
    places = "; ".join(PLACES[name][0] for name in world.backgrounds)
    return (
        f"one object ({sizes}; {colours}; {shapes}) that stands still, moves left, right, up or down, bounces, moves "
        f"in a circle, spins, grows or shrinks, slowly or quickly, in one place ({places}), in English or Chinese"
    )


def language_of(prompt: str) -> Language:
    """Chinese as soon as there is a Chinese character."""
    return "zh" if re.search(chinese.CHARACTER, prompt) else "en"


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """The word-level tokenizer: lower case, one token per word or ideograph, an end token, padding to the right.

    Returns:
        A `PreTrainedTokenizerFast` with `model_max_length` 24; save it with `save_pretrained`.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate((PAD, EOS, UNK, *VOCABULARY))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"\W+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(chinese.CHARACTER), "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, ids[EOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=MAX_TOKENS,
        padding_side="right",
    )
