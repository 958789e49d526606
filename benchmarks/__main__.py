"""Measurements of speed, memory and work.

    python -m benchmarks list                         what there is
    python -m benchmarks step train --threads 2       cases of speed; without a name all of them
    python -m benchmarks memory --only text           a table, with options of its own

Of a case all ways run in turn in one process, in every round, so that a machine that is shared slows all of them down
alike; what is read are the ratios within a round. "ours" is what the package does, "plain" the same in eager layers
written from the papers (`benchmarks/plain`), "floor" the products and convolutions of ours by themselves.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from opensora.errors import OpenSoraError
from opensora.tuning import LARGE_PAGES, TUNABLES, tune

ALLOCATORS = {"default": None, "tuned": LARGE_PAGES}
"""Name -> what glibc is told."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise OpenSoraError(message)


def main(args: list[str]) -> int:
    """Runs a command line and returns its exit code."""
    from benchmarks.catalogue import TABLES

    try:
        if args[:1] == ["list"]:
            return _list(args[1:])
        if args and args[0] in TABLES:
            return _table(args[0], args[1:])
        return _cases(args)
    except OpenSoraError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks: interrupted", file=sys.stderr)
        return 130


def _list(args: list[str]) -> int:
    from benchmarks.catalogue import CASES, TABLES, case

    _Parser("python -m benchmarks list").parse_args(args)
    print("cases")
    for name, summary in CASES.items():
        print(f"  {name:18} {summary} [{', '.join(case(name).SIZES)}]")
    print("tables, with options of their own")
    for name, summary in TABLES.items():
        print(f"  {name:18} {summary}")
    return 0


def _table(name: str, args: list[str]) -> int:
    from benchmarks.catalogue import table

    table(name).main(args)
    return 0


def _cases(args: list[str]) -> int:
    from benchmarks.catalogue import CASES, check_names, size_of
    from opensora.files import check_writable

    options = _parser().parse_args(args)
    names = options.cases or list(CASES)
    check_names(names)
    for path in filter(None, (options.output, options.plot)):
        check_writable(path)
    if options.allocator and os.environ.get(TUNABLES) != ALLOCATORS[options.allocator]:
        return _with_allocator(ALLOCATORS[options.allocator], args)
    if "torch" not in sys.modules:
        tune()
    sizes = {name: size_of(name, options.size) for name in names}
    if options.plot:
        from opensora.lab.latents.picture import import_matplotlib

        import_matplotlib()
    return _measure(sizes, options, args)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="of `list`; all of them when left out")
    parser.add_argument("--size", help="of `list`; each case's first when left out")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=_positive, metavar="N", help="of each process; as many as it may use")
    parser.add_argument("--rounds", type=_positive, default=5, metavar="N", help="how often each way runs (5)")
    parser.add_argument("--compile", action="store_true", help="measure compiled blocks, too (a minute more a case)")
    parser.add_argument(
        "--allocator", choices=list(ALLOCATORS), help="glibc as it is, or as the program sets it; as the environment is"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="every figure of every round")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="a picture of all of them")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 10_000:
        raise argparse.ArgumentTypeError(f"{text!r} given, expected a whole number from 1")
    return int(text)


def _with_allocator(tunables: str | None, args: list[str]) -> int:
    """The same in a process that starts with such an allocator: glibc reads its settings then."""
    environment = {name: value for name, value in os.environ.items() if name != TUNABLES}
    if tunables is not None:
        environment[TUNABLES] = tunables
    return subprocess.run([sys.executable, "-m", "benchmarks", *args], env=environment).returncode


def _measure(sizes: dict[str, str], options: argparse.Namespace, args: list[str]) -> int:
    import torch

    from benchmarks.catalogue import case
    from benchmarks.comparison import Setting
    from benchmarks.measuring import measure
    from benchmarks.report import document, draw, print_table
    from opensora.files import replacing

    if options.threads:
        torch.set_num_threads(options.threads)
    found, dtype = [], getattr(torch, options.dtype)
    for name, size in sizes.items():
        for comparison in case(name).comparisons(Setting(size, options.dtype, options.compile, options.threads)):
            found.append(measure(name, size, comparison, options.rounds, dtype))
            print_table(found[-1])
    if options.output:
        with replacing(options.output) as path:
            command = ["python", "-m", "benchmarks", *args]
            path.write_text(json.dumps(document(found, command, options.dtype), indent=1) + "\n")
    if options.plot:
        with replacing(options.plot) as path:
            draw(found, path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
