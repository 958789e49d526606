"""The command itself: help, version, unknown commands and options, exit codes, start-up time."""

import os
import subprocess
import sys
import types
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
import tyro

import opensora
from opensora.cli.main import COMMANDS, main
from opensora.cli.options import option
from opensora.cli.parsing import parse
from opensora.errors import OpenSoraError


def test_help_and_version(capsys):
    assert main([]) == 0 and main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"opensora {opensora.__version__}\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["genrate", "x"], "unknown command 'genrate'; did you mean generate?"),
        (["--versoin"], "did you mean --version?"),
        (["generate", "x", "--sed", "3"], "unknown option --sed; did you mean --seed?"),
        (["generate", "x", "--cfg-chanel=3"], "unknown option --cfg-chanel; did you mean --cfg-channel?"),
        (["generate", "x", "--seed", "many"], "'many' is not a whole number"),
        (["generate", "x", "--fps", "many"], "'many' is not a number"),
        (["generate", "x", "--seed"], "--seed needs a value: --seed N|random"),
        (["generate", "a", "red", "ball"], "unexpected red, ball; text with spaces belongs in quotes"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(args, message, capsys):
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("opensora: ")
    assert message in err


def test_the_help_of_a_subcommand(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--help"])
    assert not stop.value.code
    text = capsys.readouterr().out
    for name in ["--cfg-channels", "--cfg-channel", "--from", "--negative-prompt", "--no-metadata"]:
        assert name in text
    assert "None" not in text


def with_command(monkeypatch: pytest.MonkeyPatch, error: BaseException | None) -> None:
    class Broken:
        def run(self) -> None:
            if error:
                raise error

    module = types.ModuleType("opensora.cli.broken")
    module.Broken = dataclass(Broken)  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "opensora.cli.broken", module)
    monkeypatch.setitem(COMMANDS, "broken", "for this test")


def test_exit_codes(monkeypatch, capsys):
    with_command(monkeypatch, None)
    assert main(["broken"]) == 0
    with_command(monkeypatch, KeyboardInterrupt())
    assert main(["broken"]) == 130
    assert capsys.readouterr().err == "opensora: interrupted\n"
    with_command(monkeypatch, OpenSoraError("two\nlines"))
    assert main(["broken"]) == 2
    assert capsys.readouterr().err == "opensora: two lines\n"
    with_command(monkeypatch, PermissionError(13, "Permission denied", "/secret\nplace"))
    assert main(["broken"]) == 2
    assert capsys.readouterr().err == "opensora: /secret place: Permission denied\n"
    for error in [ZeroDivisionError(), OSError(5, "Input/output error")]:
        with_command(monkeypatch, error)
        with pytest.raises(type(error)):  # a mistake of ours shows where it is
            main(["broken"])


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("args", [["--help"], ["generate", "--help"], ["models", "--json"]])
def test_a_pipe_that_is_closed_ends_the_command_quietly(args, unbuffered):
    """As in `opensora models | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "opensora.cli.main", *args]
    try:
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=environment, timeout=120)
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, b"")


@pytest.mark.parametrize(
    "args",
    [
        ["generate", "a red ball rolls left", "--output", "a" * 300 + ".mp4"],
        ["generate", "a red ball rolls left", "--output", "a" * 300],
        ["generate", "--from", "a" * 300 + ".mp4"],
        ["generate", "a red ball rolls left", "--model", "a" * 300],
        ["evaluate", "toybox", "--output", "a" * 300],
    ],
)
def test_a_name_no_file_can_have_is_one_line(args, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("opensora: ") and "name too long" in err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@dataclass
class One:
    size: int = 3


@dataclass
class Two:
    colour: str = "red"


Either = Annotated[One, tyro.conf.subcommand("one")] | Annotated[Two, tyro.conf.subcommand("two")]


def test_a_union_of_commands():
    assert parse(Either, ["one", "--size", "4"], "x") == One(4)
    for args, message in [
        (["two", "--color", "4"], "unknown option --color; did you mean --colour?"),
        (["tow", "--size", "3"], "unknown command 'tow'; did you mean two?"),
        (["two", "--colour"], "--colour needs a value"),
        ([], "Expected one of {one, two}"),
    ]:
        with pytest.raises(OpenSoraError, match=r"^[^\n]*$") as caught:
            parse(Either, args, "x")
        assert message in str(caught.value)


@dataclass(frozen=True)
class Choosing:
    words: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    colour: Literal["red", "green"] = "red"
    stream: Annotated[Literal["networks", "blocks"] | None, option("[networks|blocks]")] = None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--colour", "gren"], "--colour is 'gren', expected one of red, green; did you mean green? (see x --help)"),
        (["--colour", "blue"], "--colour is 'blue', expected one of red, green (see x --help)"),
        (["--stream", "bloks"], "--stream is 'bloks', expected one of networks, blocks; did you mean blocks?"),
        (["word", "--stream", "bloks"], "--stream is 'bloks', expected one of networks, blocks; did you mean blocks?"),
        (["word", "--stream", "gpu"], "--stream is 'gpu', expected one of networks, blocks (see x --help)"),
        (["--stream=gpu"], "--stream is 'gpu', expected one of"),
    ],
)
def test_a_value_that_is_none_of_those_there_are(args, message):
    with pytest.raises(OpenSoraError, match=r"^[^\n]*$") as caught:
        parse(Choosing, args, "x")
    assert message in str(caught.value)
    assert parse(Choosing, ["--stream", "a word"], "x") == Choosing(("a word",), stream="networks")


def test_help_loads_nothing_heavy():
    code = (
        "import sys, opensora.cli.main as m; m.main(['--help']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'transformers', 'av', 'numpy', 'tyro')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0
    code = (
        "import sys, opensora.cli.generate; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0
