"""Prompts spelled the way the published models' captions were: lower case, without addresses, codes or ornaments.

The 1.0 to 1.2 models were trained on captions that went through a fixed list of substitutions (those of DeepFloyd IF,
made for alt texts of pictures from the web). A prompt is understood best when it goes through the same list, so the
list stands here rule by rule, in its order, oddities included: `#1234` stays while `#123` and `#12345` go, kana and
Hangul stay while ideographs go.
"""

import html
import re
import unicodedata
import urllib.parse
import warnings
from collections.abc import Sequence

from opensora.errors import OpenSoraError

# What comes before a dot, and what may follow: a web address even without its protocol.
_BARE_ADDRESS = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_FILE_ENDING = r"(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
# Dashes of all scripts: Armenian, Hebrew, Canadian, Mongolian, general, double and wavy, small and full width.
_DASHES = (
    r"\u002D\u058A\u05BE\u1400\u1806\u2010-\u2015\u2E17\u2E1A\u2E3A\u2E3B\u2E40"
    r"\u301C\u3030\u30A0\uFE31\uFE32\uFE58\uFE63\uFF0D"
)
_ORNAMENTS = r"#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*"

_Rules = list[tuple[re.Pattern[str], str]]


def _compiled(rules: list[tuple[str, str]]) -> _Rules:
    return [(re.compile(pattern), replacement) for pattern, replacement in rules]


_ADDRESSES = _compiled(
    [
        ("<person>", "person"),
        (rf"\b(?:https?:(?:/{{1,3}}|[a-zA-Z0-9%])|{_BARE_ADDRESS})", ""),
        (rf"\b(?:www:(?:/{{1,3}}|[a-zA-Z0-9%])|{_BARE_ADDRESS})", ""),
    ]
)

_SIGNS = _compiled(
    [
        (r"@\w+\b", ""),  # nicknames
        ("[\u31c0-\u9fff]+", ""),  # strokes, enclosed and compatibility letters, all unified ideographs
        (f"[{_DASHES}]+", "-"),
        ("[`´«»“”¨]", '"'),
        ("[‘’]", "'"),
        ("&quot;?", ""),
        ("&amp", ""),
        (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # internet addresses in numbers
        (r"\d:\d\d\s+$", ""),  # a time of day at the end
        (r"\\n", " "),  # a line break that was spelled out
        (r"#\d{1,3}\b", ""),
        (r"#\d{5,}\b", ""),
        (r"\b\d{6,}\b", ""),
        (rf"\S+\.{_FILE_ENDING}", ""),
        ("[\"']{2,}", '"'),
        (r"\.{2,}", " "),
        (f"[{_ORNAMENTS}]+", " "),
        (r"\s+\.\s+", " "),
    ]
)

_SALES_TALK = _compiled(
    [
        # Codes of articles: jc6640, jc6640vc, 6640vc231.
        (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
        (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
        (r"\b\d+[a-zA-Z]+\d+\b", ""),
        (r"(worldwide\s+)?(free\s+)?shipping", ""),
        (r"(free\s)?download(\sfree)?", ""),
        (r"\bclick\b\s(?:for|on)\s\w+", ""),
        (rf"\b{_FILE_ENDING}(\simages?)?", ""),
        (r"\bpage\s+\d+\b", ""),
        (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # longer codes: j2d1a2a4
        (r"\b\d+\.?\d*[x\u0445×]\d+\.?\d*\b", ""),  # sizes, also with the Cyrillic letter
        (r"\b\s+:\s+", ": "),
        (r"(\D[,./])\b", r"\1 "),
        (r"\s+", " "),
    ]
)

_ENDS = _compiled(
    [
        (r"""^["']([\w\W]+)["']$""", r"\1"),
        (r"^['_,\-:;]", ""),
        (r"['_,\-:+]$", ""),
        (r"^\.\S+$", ""),
    ]
)

# Words, as far as cleaning tells them apart: ideographs need no spaces around them.
_WORD = re.compile("[\u31c0-\u9fff]+|[^\\W_\u31c0-\u9fff]+")

# With more of these than 3, they stand for spaces: this-is-my-cute-cat.
_JOINTS = re.compile("[-_]")
_MOST_JOINTS = 3


def clean_text(text: str, passes: int = 2) -> str:
    """The text as the captions of the published 1.0 to 1.2 models were spelled.

    Args:
        text: a prompt.
        passes: how often the list of rules is applied. The models were trained on 2, and a second time does change
            things: what the first uncovers (an escaped tag, say) the second removes.

    Returns:
        The cleaned text; empty where nothing but ornaments was in it.

    Raises:
        OpenSoraError: the text holds markup that cannot be read (such as `<![`).
    """
    for _ in range(passes):
        text = _clean_once(text)
    return text


def removed_words(text: str, cleaned: str) -> list[str]:
    """The words that cleaning took out of a text, as they stood in it, each once: `["R2D2", "一个小红球"]`.

    Args:
        text: before cleaning.
        cleaned: what `clean_text` made of it.
    """
    kept = _folded(cleaned)
    words = dict.fromkeys(_WORD.findall(html.unescape(urllib.parse.unquote_plus(text))))
    return [word for word in words if _folded(word) not in kept]


def leaves_nothing(text: str) -> bool:
    """Whether cleaning takes every letter and digit out of a text that had some, such as a Chinese caption."""
    return has_words(text) and not has_words(clean_text(text))


def has_words(text: str) -> bool:
    """Whether there is a letter or a digit in it."""
    return any(character.isalnum() for character in text)


def _folded(text: str) -> str:
    """Without differences in case and width, which cleaning may change and nobody misses."""
    return unicodedata.normalize("NFKC", text).casefold()


def _clean_once(text: str) -> str:
    import ftfy

    text = urllib.parse.unquote_plus(text).strip().lower()
    text = _apply(_ADDRESSES, text)
    text = _without_tags(text)
    text = _apply(_SIGNS, text)
    if len(_JOINTS.findall(text)) > _MOST_JOINTS:
        text = _JOINTS.sub(" ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    text = _apply(_SALES_TALK, text)
    # No strip in between: a blank at an end shields what stands before it from these rules.
    return _apply(_ENDS, text).strip()


def _apply(rules: Sequence[tuple[re.Pattern[str], str]], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _without_tags(text: str) -> str:
    import bs4

    with warnings.catch_warnings():
        # A prompt may look like the name of a file; it is one all the same.
        warnings.simplefilter("ignore", bs4.MarkupResemblesLocatorWarning)
        try:
            return bs4.BeautifulSoup(text, features="html.parser").text
        except bs4.ParserRejectedMarkup:
            raise OpenSoraError(f"the prompt {text!r} holds markup that cannot be read; write it without '<'") from None
