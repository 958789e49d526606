"""The README and its Chinese twin say the same."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))


def code_blocks(text: str) -> list[str]:
    return re.findall(r"```.*?```", text, flags=re.DOTALL)


def figures_of_tables(text: str) -> list[list[str]]:
    return [re.findall(r"\d+(?:\.\d+)?", line) for line in text.splitlines() if line.startswith("|")]


def test_commands_are_the_same() -> None:
    assert code_blocks(ENGLISH) == code_blocks(CHINESE)


def test_tables_hold_the_same_figures() -> None:
    assert figures_of_tables(ENGLISH) == figures_of_tables(CHINESE)


def test_sections_and_pictures_are_the_same() -> None:
    assert len(re.findall(r"^## ", ENGLISH, flags=re.M)) == len(re.findall(r"^## ", CHINESE, flags=re.M))
    pictures = [re.findall(r"!\[.*?\]\((.*?)\)", text) for text in (ENGLISH, CHINESE)]
    assert pictures[0] == pictures[1]
    assert all((ROOT / picture).is_file() for picture in pictures[0])


def test_every_link_leads_somewhere() -> None:
    for text in (ENGLISH, CHINESE):
        for target in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (ROOT / target).exists(), target


def test_the_page_on_diffusers_names_tests_that_there_are() -> None:
    page = (ROOT / "docs" / "diffusers.md").read_text(encoding="utf-8")
    files = set(re.findall(r"`((?:tests/)?[\w/]*test_\w+\.py)`", page))
    assert files
    for file in files:
        assert (ROOT / file if file.startswith("tests/") else ROOT / "tests" / "contract" / file).is_file(), file
