"""The program: `opensora`, or `python -m opensora`. It knows Ctrl-C before anything else is imported.

`--no-tuning` anywhere on the command line leaves threads and memory to the libraries' and Python's own defaults, see
`tuning`.
"""

import sys

QUICK = ("help", "--help", "-h", "--version", "-V")


def main() -> int:
    """Runs the command line and returns its exit code, see `cli.main`."""
    try:
        _tune()
        from opensora.cli.main import EXIT_INTERRUPTED, main
    except KeyboardInterrupt:
        sys.stderr.write("opensora: interrupted\n")
        return 130
    try:
        return main()
    except KeyboardInterrupt:  # while it ends
        return EXIT_INTERRUPTED


def _tune() -> None:
    """For whatever computes; before anything is imported that would have to be imported again."""
    if "--no-tuning" in sys.argv:
        sys.argv.remove("--no-tuning")
    elif len(sys.argv) > 1 and sys.argv[1] not in QUICK:
        from opensora.tuning import collect_less_often, tune, use_large_pages

        use_large_pages()
        tune()
        collect_less_often()


if __name__ == "__main__":
    sys.exit(main())
