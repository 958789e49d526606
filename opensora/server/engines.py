"""Models that a worker has in memory, and which of them go when another one is asked for."""

import gc
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import psutil
import torch

from opensora.checkpoints.loading import choose_device
from opensora.errors import OpenSoraError
from opensora.generation.engine import Engine
from opensora.generation.request import OF_THE_MODEL, ClipRequest
from opensora.planning.report import verdict_of
from opensora.planning.request import plan_request


class Engines:
    """Models of one device; the one that was not used for the longest time goes first.

    Args:
        device: where they work; None for an accelerator if there is one.
        max_memory_bytes: of all of them and the clip that is made; None for what the device has left.
    """

    def __init__(self, device: str | None = None, max_memory_bytes: int | None = None) -> None:
        self.device = choose_device(device)
        self._max_memory_bytes = max_memory_bytes
        self._loaded: OrderedDict[str, tuple[Engine, int]] = OrderedDict()

    def of(self, request: ClipRequest) -> Engine:
        """The model of a request, loaded as its plan says: with whatever makes the clip fit.

        Raises:
            OpenSoraError: it cannot be loaded, or the clip does not fit whatever is chosen.
        """
        key = repr([getattr(request, name) for name in OF_THE_MODEL])
        if key in self._loaded:
            self._loaded.move_to_end(key)
            return self._loaded[key][0]
        way = self._make_room(request)["with"]
        choices = dict(way["choices"])
        dtype = choices.pop("dtype", request.dtype)
        engine = Engine.load(replace(request, device=str(self.device), dtype=dtype), **choices)
        self._loaded[key] = (engine, way["weight_bytes"])
        return engine

    def _make_room(self, request: ClipRequest) -> dict[str, Any]:
        """A plan of the clip in the memory that is left."""
        while True:
            plan = plan_request(
                request, device=self.device.type, memory_bytes=self._left(), known_frames=request.shows_frames
            )
            as_it_is = plan["fits"] and not plan["with"]["choices"]
            if as_it_is or not self._loaded:
                break
            self._loaded.popitem(last=False)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        if not plan["fits"]:
            raise OpenSoraError(verdict_of(plan))
        return plan

    def _left(self) -> int:
        """Memory for a model and its clip."""
        if self._max_memory_bytes is not None:
            return max(0, self._max_memory_bytes - sum(weight_bytes for _, weight_bytes in self._loaded.values()))
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        return psutil.virtual_memory().available
