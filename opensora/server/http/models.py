"""The models that clips can be asked of."""

from collections.abc import Mapping
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from opensora.server.defaults import model_defaults
from opensora.server.http.access import Owner, Service
from opensora.server.http.errors import answers

router = APIRouter(prefix="/v1/models", tags=["models"])


class Model(BaseModel):
    """A model, as OpenAI's clients list them."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "opensora"
    defaults: Mapping[str, bool | int | float | str]


class ModelList(BaseModel):
    """All of them; the first is that of requests which name none."""

    object: Literal["list"] = "list"
    data: list[Model]


@router.get("", responses=answers())
def list_models(service: Service, owner: Owner) -> ModelList:
    """List the models of this server."""
    return ModelList(data=[_model(name) for name in service.settings.models])


def _model(name: str) -> Model:
    defaults = {key: value for key, value in model_defaults(name).items() if isinstance(value, int | float | str)}
    return Model(id=name, defaults=defaults)
