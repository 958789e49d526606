"""`opensora studio`: the server with its page, in the browser."""

import dataclasses
import importlib.util
import os
import sys
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from opensora.cli.options import FLAG, option
from opensora.cli.serve import ServerOptions
from opensora.errors import OpenSoraError

PAGE = "opensora.studio.process"


@dataclass(frozen=True)
class Studio(ServerOptions):
    """Make clips in the browser: `opensora serve` with a page.

    The page shows queue, gallery, comparisons and training runs; closing it stops nothing.
    """

    runs: Annotated[Path, option("FOLDER", "outputs")] = Path("outputs")
    """Training runs in it, and in its folders, are shown."""
    most_of_key: Annotated[int, option("N", "64")] = 64
    """and of each."""
    no_browser: Annotated[bool, FLAG] = False
    """Only say the address."""

    def run(self) -> int:
        """Returns only if a process cannot work; it ends by Ctrl-C or SIGTERM."""
        if importlib.util.find_spec("gradio") is None:
            raise OpenSoraError("the page needs gradio: pip install 'opensora[studio]'")
        settings = dataclasses.replace(self.settings(), runs=self.runs.absolute())
        # The page is shown as soon as the process that answers has started: until then the browser waits.
        return self.start(settings, PAGE, None if self.no_browser else _open)


def _open(url: str) -> None:
    """Opens a window, where there are windows: a browser of the terminal would take it from the server."""
    if sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(url)
