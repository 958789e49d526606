"""Models in a worker's memory: which stay, which go, and with what they are loaded."""

from typing import Any

import pytest

from opensora.errors import OpenSoraError
from opensora.generation.request import ClipRequest
from opensora.server import engines as module
from opensora.server.engines import Engines

GB = 2**30
WEIGHTS = {"small": 1 * GB, "middle": 4 * GB, "large": 9 * GB}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ClipRequest, dict[str, Any]]]:
    """What was loaded, and how; a model fits as it is, or with blocks offloaded in a quarter of that."""
    loaded: list[tuple[ClipRequest, dict[str, Any]]] = []

    def plan(request: ClipRequest, *, memory_bytes: int, **_: Any) -> dict[str, Any]:
        weight_bytes = WEIGHTS[request.model_name]
        if weight_bytes <= memory_bytes:
            return {"fits": True, "with": {"choices": {}, "weight_bytes": weight_bytes}}
        if weight_bytes / 4 <= memory_bytes:
            choices = {"offload": "blocks", "dtype": "int8"}
            return {"fits": True, "with": {"choices": choices, "weight_bytes": weight_bytes // 4}}
        return {"fits": False}

    def load(request: ClipRequest, **choices: Any) -> object:
        loaded.append((request, choices))
        return object()

    monkeypatch.setattr(module, "plan_request", plan)
    monkeypatch.setattr(module, "verdict_of", lambda _: "does not fit")
    monkeypatch.setattr(module.Engine, "load", load)
    return loaded


def asked(model: str, **more: Any) -> ClipRequest:
    return ClipRequest("a ball", model=model, **more)


def test_a_model_is_loaded_once(loads) -> None:
    engines = Engines("cpu", 10 * GB)
    assert engines.of(asked("small")) is engines.of(asked("small", seed=7))
    assert engines.of(asked("small", dtype="bfloat16")) is not engines.of(asked("small")), (
        "in other numbers another one"
    )
    assert [(request.model, request.device) for request, _ in loads] == [("small", "cpu")] * 2


def test_models_stay_as_long_as_there_is_room_and_the_least_used_goes_first(loads) -> None:
    engines = Engines("cpu", 10 * GB)
    middle, small = engines.of(asked("middle")), engines.of(asked("small"))
    assert engines.of(asked("middle")) is middle
    engines.of(asked("large"))
    assert engines.of(asked("small")) is not small
    assert [request.model for request, _ in loads] == ["middle", "small", "large", "small"]


def test_a_model_makes_the_others_go_before_it_is_loaded_in_a_slower_way(loads) -> None:
    engines = Engines("cpu", 10 * GB)
    engines.of(asked("middle"))
    engines.of(asked("large"))
    assert (loads[-1][0].model, loads[-1][1]) == ("large", {})


def test_a_model_that_is_too_large_is_loaded_as_its_plan_says(loads) -> None:
    Engines("cpu", 3 * GB).of(asked("large"))
    (request, choices), *_ = loads
    assert (request.dtype, choices) == ("int8", {"offload": "blocks"})
    with pytest.raises(OpenSoraError, match="does not fit"):
        Engines("cpu", 2 * GB).of(asked("large"))
