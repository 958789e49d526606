"""The command `opensora`: finds the subcommand and turns every mistake of the user's into one line and exit code 2.

A subcommand is one line in `COMMANDS` and one module of this package with a dataclass of the same name, capitalised
("plan serving" is `PlanServing` of `plan_serving`), or a union of dataclasses, one for each thing it can do: its fields
are the options, its method `run()` does the work and may return an exit code. The module is imported only when it is
called, and should import what is heavy only in `run()`.
"""

import contextlib
import errno
import sys
from collections.abc import Sequence

from opensora import __version__
from opensora.cli.surroundings import (
    check_working_folder,
    drop_output,
    open_standard_streams,
    signals_raised,
    threads_quiet_about_files,
    with_home,
)
from opensora.contents import shown
from opensora.errors import OpenSoraError, Terminated, is_out_of_memory

COMMANDS = {
    "generate": "turn a prompt into a video",
    "calibrate": "find out what of a model's work generate --fast may forecast",
    "data": "make a table of clips, and see what training will make of it",
    "train": "train a model by a recipe",
    "evaluate": "measure what a model can do",
    "compare": "put settings side by side, on the same prompts and noise",
    "latents": "say whether an autoencoder's latents are what a diffusion model expects, and normalise them",
    "serve": "answer requests for clips over HTTP, from a queue that loses nothing",
    "studio": "make clips in the browser: serve with a page",
    "models": "list the models known by name, and what of them is here",
    "inspect": "say what a checkpoint is and whether its parts fit together",
    "plan": "predict the memory a clip takes, and what makes it fit",
    "plan serving": "predict how long clips wait in a queue, and how many workers keep that short",
    "convert": "write a checkpoint as a folder of this package",
    "push": "put a model's folder on the Hub",
}

_LONGEST_MESSAGE = 1500  # it quotes what came, which may be megabytes

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells expect
EXIT_CLOSED_PIPE = 141  # 128 + SIGPIPE

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_LESS_MEMORY = {
    "generate": "choose fewer frames, a smaller size, --offload or --dtype bfloat16; opensora plan tells what fits",
    "train": "choose smaller buckets or batches, or loop.activation_checkpointing=true; --dry-run tells more",
    "data": "choose fewer --workers, smaller buckets or a smaller --shard-mb",
    "evaluate": "choose a smaller --batch-size, or fewer clips",
    "latents": "choose fewer --num-frames, or a smaller --height and --width",
}


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code.

    0; 1 if `opensora evaluate compare` finds a regression; 2 for what the user can mend; 130, 143, 129 for Ctrl-C,
    SIGTERM, SIGHUP; 141 if nobody reads the output any more, as in `opensora models | head -1`.
    """
    args = list(sys.argv[1:] if args is None else args)
    closed = open_standard_streams()
    try:
        with signals_raised(), threads_quiet_about_files():
            if closed:
                raise OpenSoraError("standard output is closed, so nothing could be told; /dev/null would do")
            try:
                code = _run(args)
            except SystemExit as end:  # after a help page
                sys.stdout.flush()
                if end.code == 1:  # of rich, which has found the pipe closed
                    return EXIT_CLOSED_PIPE
                raise
            sys.stdout.flush()  # what cannot be written is noticed here, and not when the interpreter ends
            return code
    except OpenSoraError as error:
        return _told(error, str(error), EXIT_USER_ERROR)
    except Terminated as signal:
        return _told(signal, str(signal), 128 + signal.number)
    except KeyboardInterrupt as interrupt:
        return _told(interrupt, str(interrupt) or "interrupted", EXIT_INTERRUPTED)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and error.filename is None:
            drop_output()
            return EXIT_CLOSED_PIPE
        statement = _statement(error, args)
        if statement is None:
            raise
        return _told(error, statement, EXIT_USER_ERROR)


def _statement(error: Exception, args: list[str]) -> str | None:
    """What happened, and what to do; None for mistakes of ours, which show where they are."""
    if is_out_of_memory(error):
        advice = _LESS_MEMORY.get(args[0] if args else "", "end other programs, or use a machine with more of it")
        return f"out of memory; {advice}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and drop_output():
        return f"standard output cannot be written: {error.strerror or error}"
    if isinstance(error, OSError) and error.errno in _FULL:
        return f"cannot write: {error.strerror}; make room, or send the output elsewhere"
    return None


def _told(reason: BaseException, statement: str, code: int) -> int:
    """Says it in one line, with what was written until then, and returns the exit code."""
    statement = "; ".join([statement, *getattr(reason, "__notes__", ())])
    with contextlib.suppress(OSError):  # nobody listens
        print(f"opensora: {shown(' '.join(statement.split()), _LONGEST_MESSAGE)}", file=sys.stderr, flush=True)
    drop_output()
    return code


def _run(args: list[str]) -> int:
    words = 2 if " ".join(args[:2]) in COMMANDS else 1
    command = " ".join(args[:words]) or "--help"
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
    check_working_folder()
    from opensora.cli.mistakes import kind_of
    from opensora.cli.options import with_flags
    from opensora.cli.parsing import parse

    options = parse(kind_of(command), [with_home(word) for word in args[words:]], f"opensora {command}")
    try:
        return options.run() or 0
    except OpenSoraError as error:
        renamed = OpenSoraError(with_flags(str(error), options))
        for note in getattr(error, "__notes__", ()):
            renamed.add_note(note)
        raise renamed from error


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    return (
        "usage: opensora COMMAND [OPTIONS]\n\n"
        "Text to video with the Open-Sora family of diffusion transformers.\n\n"
        f"commands:\n{commands}\n\n"
        "opensora COMMAND --help tells more; opensora --version says which this is.\n"
        "--no-tuning, with any command, leaves threads and memory to the libraries' own defaults.\n"
        'Try: opensora generate "a small red ball rolls left over the grass"'
    )


if __name__ == "__main__":
    sys.exit(main())
