"""ComfyUI itself, as `make comfyui` fetches it, with the nodes of this repository."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACK = ROOT / "integrations" / "comfyui"
COMFYUI = ROOT / ".venv" / "comfyui"


class ComfyUI:
    """A running ComfyUI with the nodes of this repository, see `integrations/run_comfyui.py`."""

    def __init__(self, output: Path) -> None:
        self.folder = output
        script = Path(__file__).parent / "integrations" / "run_comfyui.py"
        self._log = (output / "log.txt").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, str(script), str(COMFYUI / "ComfyUI"), str(PACK), str(output)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{COMFYUI / 'packages'}", "OMP_NUM_THREADS": "1"},
        )
        self.schemas: dict[str, dict[str, Any]] = self._answer()["schemas"]

    def run(self, workflow: dict[str, Any], **asked: Any) -> dict[str, Any]:
        """Runs a workflow, and returns what became of it."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"workflow": workflow, **asked}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise AssertionError(f"ComfyUI ended:\n{self._log.read()[-3000:]}")
        return json.loads(line)

    def close(self) -> None:
        self._process.communicate(timeout=60)
        self._log.close()
