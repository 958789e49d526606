"""The command line with a pipeline that paints noise, as its own tests have it."""

from cli.conftest import pipe

__all__ = ["pipe"]
