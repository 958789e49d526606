"""Open-Sora in ComfyUI: nodes that make clips on this machine, and nodes that have an `opensora serve` make them.

ComfyUI calls `comfy_entrypoint`. Nothing here imports the package `opensora` before a node runs.
"""

from comfy_api.latest import ComfyExtension, io

from .local_nodes import LOCAL_NODES
from .server_nodes import SERVER_NODES


class OpenSoraExtension(ComfyExtension):
    """All nodes of this pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [*LOCAL_NODES, *SERVER_NODES]


async def comfy_entrypoint() -> OpenSoraExtension:
    """What ComfyUI asks every pack for."""
    return OpenSoraExtension()
