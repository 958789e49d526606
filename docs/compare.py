"""Makes docs/images/compare.png: what the page of a comparison looks like. `python docs/compare.py`

Needs a browser (Debian's chromium, or Chrome) and playwright, which the extra `dev` installs.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from opensora.cli.main import main

COMMAND = "compare --model toybox-iddpm --cfg-channels 3 all --guidance-scale 2 7 --prompts 4 --metrics flicker colour"
PICTURE = Path(__file__).parent / "images" / "compare.png"


def photograph(page: Path, picture: Path) -> None:
    """The players of a page, while they play."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    options = ["--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=options)
        shown = browser.new_page(viewport={"width": 1100, "height": 760})
        shown.goto(page.as_uri())
        shown.evaluate("document.getElementById('bar').scrollIntoView()")
        shown.locator("#below").select_option("flicker_levels")
        asking = "const ask = () => duration && place > 1 && place < 1.2 ? done() : requestAnimationFrame(ask); ask();"
        shown.evaluate(f"new Promise(done => {{ {asking} }})")
        shown.screenshot(path=picture)
        browser.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        if main([*COMMAND.split(), "--workers", "2", "--output", folder]) != 0:
            sys.exit("the comparison was not made")
        photograph(Path(folder) / "index.html", PICTURE)
