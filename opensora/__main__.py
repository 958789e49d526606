"""The program: `opensora`, or `python -m opensora`. It knows Ctrl-C before anything else is imported."""

import sys


def main() -> int:
    """Runs the command line and returns its exit code, see `cli.main`."""
    try:
        from opensora.cli.main import EXIT_INTERRUPTED, main
    except KeyboardInterrupt:
        sys.stderr.write("opensora: interrupted\n")
        return 130
    try:
        return main()
    except KeyboardInterrupt:  # while it ends
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
