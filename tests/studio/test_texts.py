"""Texts of the page: each in both languages, with the same values, and none that nobody says."""

import json
import re

from opensora.studio.app import FILES

TEXTS = json.loads((FILES / "texts.json").read_text())
SCRIPTS = "".join(path.read_text() for path in sorted(FILES.glob("*.js")))
# Keys that are put together in scripts: `field.${name}`, and words of states and stages.
BUILT = re.compile(r"(tab|theme|field|about|group|source|channels|frames|state|stage)\.\w+")


def test_every_text_is_there_in_both_languages_with_the_same_values() -> None:
    for key, text in TEXTS.items():
        assert set(text) == {"en", "zh"} and all(text.values()), key
        english, chinese = (sorted(re.findall(r"{\w+}", words)) for words in text.values())
        assert english == chinese, key


def test_chinese_texts_are_chinese() -> None:
    own = [key for key, text in TEXTS.items() if not re.search(r"[\u4e00-\u9fff]", text["zh"])]
    assert own == ["job.downloading"]  # a file's name alone


def test_every_text_is_said_and_every_text_that_is_said_is_there() -> None:
    said = set(re.findall(r"\"([a-z]+(?:[._][a-z_]+)*)\"", SCRIPTS))
    assert {key for key in TEXTS if key not in said and not BUILT.fullmatch(key)} == set()
    asked = re.findall(r"(?:say(?:_\w+)?: \[?|\b(?:text|button|confirmed)\()\"([\w.]+)\"", SCRIPTS)
    assert len(asked) > 50
    assert set(asked) - set(TEXTS) == set()


def test_every_field_of_the_form_and_every_tab_has_its_texts() -> None:
    from opensora.studio.page import TABS

    fields = re.findall(r"^  (\w+): { kind:", SCRIPTS, flags=re.MULTILINE)
    assert len(fields) > 15
    assert {f"{kind}.{name}" for name in fields for kind in ("field", "about")} <= set(TEXTS)
    assert {f"tab.{name}" for name in TABS} <= set(TEXTS)
