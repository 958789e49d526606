"""The command `opensora`: finds the subcommand and turns every mistake of the user's into one line and exit code 2.

A subcommand is one line in `COMMANDS` and one module of this package with a dataclass of the same name, capitalised
(or a union of dataclasses, one for each thing it can do): its fields are the options, its method `run()` does the work.
The module is imported only when it is called, and should import what is heavy only in `run()`.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from opensora import __version__
from opensora.errors import OpenSoraError

COMMANDS = {
    "generate": "turn a prompt into a video",
    "data": "make a table of clips, and see what training will make of it",
    "train": "train a model by a recipe",
    "evaluate": "measure what a model can do",
    "models": "list the models known by name, and what of them is here",
    "inspect": "say what a checkpoint is and whether its parts fit together",
    "plan": "predict the memory a clip takes, and what makes it fit",
    "convert": "write a checkpoint as a folder of this package",
}

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells expect
EXIT_CLOSED_PIPE = 141  # 128 + SIGPIPE


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code: 0, 2 for a mistake in the input, 130 for Ctrl-C.

    141 if nobody reads the output any more, as in `opensora models | head -1`.
    """
    args = list(sys.argv[1:] if args is None else args)
    try:
        try:
            return _exit_code(args)
        finally:
            sys.stdout.flush()  # a pipe that was closed is noticed here, and not when the interpreter ends
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes what is left
        return EXIT_CLOSED_PIPE


def _exit_code(args: list[str]) -> int:
    """The exit code; mistakes of the user's are told on stderr."""
    try:
        return _run(args)
    except OpenSoraError as error:
        print(f"opensora: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USER_ERROR
    except OSError as error:
        if error.filename is None:  # not about a file, so no mistake of the user's
            raise
        print(f"opensora: {' '.join(f'{error.filename}: {error.strerror}'.split())}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt as interrupt:
        print(f"opensora: {interrupt.args[0] if interrupt.args else 'interrupted'}", file=sys.stderr)
        return EXIT_INTERRUPTED


def _run(args: list[str]) -> int:
    command = args[0] if args else "--help"
    if command in ("-h", "--help", "help"):
        print(_help())
        return 0
    if command in ("-V", "--version"):
        print(f"opensora {__version__}")
        return 0
    if command not in COMMANDS:
        from opensora.settings import nearest_name

        what = "option" if command.startswith("-") else "command"
        known = ["--help", "--version"] if command.startswith("-") else COMMANDS
        raise OpenSoraError(f"unknown {what} {command!r}{nearest_name(command, known)}")
    from opensora.cli.options import with_flags
    from opensora.cli.parsing import parse

    kind = getattr(importlib.import_module(f"opensora.cli.{command}"), command.capitalize())
    options = parse(kind, args[1:], f"opensora {command}")
    try:
        options.run()
    except OpenSoraError as error:
        raise OpenSoraError(with_flags(str(error), options)) from error
    return 0


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    return (
        "usage: opensora COMMAND [OPTIONS]\n\n"
        "Text to video with the Open-Sora family of diffusion transformers.\n\n"
        f"commands:\n{commands}\n\n"
        "opensora COMMAND --help tells more; opensora --version says which this is.\n"
        'Try: opensora generate "a small red ball rolls left over the grass"'
    )


if __name__ == "__main__":
    sys.exit(main())
