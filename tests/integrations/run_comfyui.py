"""ComfyUI itself, without its server and page: loads packs, then runs each workflow that comes on standard input.

    python run_comfyui.py COMFYUI PACK OUTPUT

COMFYUI is its folder, PACK the one of the nodes, OUTPUT where files go. A line in, a line out, both JSON. In comes
`{"workflow": {...}}` in the format of its API, with `stop_at` the step at which somebody presses its button; out come
`schemas` once, then for each workflow `errors` of its validation, or `success`, the `saved` files, the names of nodes
that `ran`, the `steps` that it was told of and the `message` of a failure.
"""

import asyncio
import json
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any


class Unneeded(MetaPathFinder, Loader):
    """Stands for packages that ComfyUI imports for models of its own, which no workflow here has."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        is_one = name.split(".")[0] in ("torchvision", "torchaudio")
        return ModuleSpec(name, self, is_package=True) if is_one else None

    def exec_module(self, module: ModuleType) -> None:
        def anything(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__getattr__ = anything  # type: ignore[method-assign]


class Listener:
    """In the place of ComfyUI's server: hears of nodes that run and of how far they are."""

    def __init__(self) -> None:
        self.client_id: str | None = "test"
        self.last_node_id: str | None = None
        self.events: list[tuple[str, Any]] = []

    def send_sync(self, event: Any, data: Any, sid: str | None = None) -> None:
        self.events.append((str(event), data))


def main(comfyui: Path, pack: Path, output: Path) -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # ComfyUI prints
    from transformers.utils import is_torchvision_available

    is_torchvision_available()  # it remembers the true answer
    sys.meta_path.append(Unneeded())
    sys.path.insert(0, str(comfyui))
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.utils
    import execution
    import folder_paths
    import nodes

    folder_paths.set_output_directory(str(output / "output"))
    folder_paths.set_temp_directory(str(output / "temp"))
    folder_paths.set_input_directory(str(output / "input"))
    (output / "input").mkdir(parents=True)
    for path in (comfyui / "comfy_extras" / "nodes_video.py", pack):
        if not asyncio.run(nodes.load_custom_node(str(path))):
            raise SystemExit(f"{path} could not be loaded")

    def tell(answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    own = {name: node for name, node in nodes.NODE_CLASS_MAPPINGS.items() if name.startswith("OpenSora")}
    tell({"schemas": {name: _info(node) for name, node in own.items()}})
    listener, number = Listener(), 0
    limits = {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}
    executor = execution.PromptExecutor(listener, cache_type=execution.CacheType.CLASSIC, cache_args=limits)
    for line in sys.stdin:
        asked, number, steps = json.loads(line), number + 1, []
        workflow, listener.events = asked["workflow"], []
        valid, error, outputs, node_errors = asyncio.run(execution.validate_prompt(str(number), workflow, None))
        if not valid:
            tell({"errors": json.loads(json.dumps([error, node_errors], default=str))})
            continue

        def hook(
            value: int, total: int, *_: Any, steps: list = steps, stop: int = asked.get("stop_at"), **__: Any
        ) -> None:
            steps.append([value, total])
            if value == stop:
                nodes.interrupt_processing()

        comfy.utils.set_progress_bar_global_hook(hook)
        executor.execute(workflow, str(number), {"client_id": "test"}, outputs)
        kinds = dict(executor.status_messages)
        ran = [data["node"] for event, data in listener.events if event == "executing" and data["node"]]
        files = [
            file
            for ui in executor.history_result["outputs"].values()
            for key in ui
            if key != "animated"
            for file in ui[key]
        ]
        tell(
            {
                "success": executor.success,
                "saved": [str(output / "output" / file["subfolder"] / file["filename"]) for file in files],
                "ran": [workflow[node]["class_type"] for node in ran],
                "steps": steps,
                "interrupted": "execution_interrupted" in kinds,
                "message": kinds.get("execution_error", {}).get("exception_message"),
                "given": str(kinds.get("execution_error", {}).get("current_inputs")),
            }
        )


def _info(node: Any) -> dict[str, Any]:
    """What ComfyUI tells its page of a node, once it has checked the schema."""
    node.VALIDATE_CLASS()
    schema = node.GET_SCHEMA()
    schema.validate()
    return json.loads(json.dumps(vars(schema.get_v1_info(node)), default=str))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
