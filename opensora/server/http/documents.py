"""What the OpenAPI document says of bodies, which are read by `bodies` and `fields` and not by FastAPI."""

from typing import Any

from pydantic import TypeAdapter

from opensora.generation.request import FILES
from opensora.server.http.fields import HINTS, OF_THE_JOB, OPENAI, OWN
from opensora.server.service import CLIP_FORMATS, MOST_PRIORITY

_FILE = {"type": "string", "format": "binary"}
_URL = {"type": "string", "format": "uri", "pattern": "^(https://|data:)"}
_OPENAI: dict[str, Any] = {
    "seconds": {"type": "string", "pattern": r"^\d{1,6}(\.\d{1,6})?$", "example": "4"},
    "size": {"type": "string", "pattern": r"^\d{1,6}x\d{1,6}$", "example": "64x64"},
}
_OF_THE_JOB: dict[str, Any] = {
    "format": {"type": "string", "enum": list(CLIP_FORMATS), "default": "mp4"},
    "priority": {"type": "integer", "minimum": -MOST_PRIORITY, "maximum": MOST_PRIORITY, "default": 0},
}
_EXAMPLES = {"prompt": {"example": "a red ball rolls left over the grass"}}
_ID = {"type": "object", "properties": {"id": {"type": "string"}}, "required": ["id"], "additionalProperties": False}


def clip_body(*, video: bool = False) -> dict[str, Any]:
    """Of an endpoint that makes a clip.

    Args:
        video: it needs a clip, as a file or by the id of a video.
    """
    names = [name for name in (*OWN, *OPENAI, *OF_THE_JOB) if name != "video" or video]
    required = ["prompt", "video"] if video else ["prompt"]
    as_json, as_form = {}, {}
    for name in names:
        as_json[name], as_form[name] = _schemas(name)
    return _body(
        {
            "application/json": _object(as_json, required),
            "multipart/form-data": _object(as_form, required),
        }
    )


def small_body(**properties: Any) -> dict[str, Any]:
    """Of an endpoint that takes these fields, all of which it needs."""
    return _body({"application/json": _object(properties, list(properties))})


def _body(schemas: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {kind: {"schema": each} for kind, each in schemas.items()}}}


def _object(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _schemas(name: str) -> tuple[Any, Any]:
    """Of a field, in JSON and in a form."""
    if name == "reference_path":
        return {"type": "array", "items": _URL}, {"type": "array", "items": _FILE}
    if name in FILES:
        return _URL, _FILE
    if name == "input_reference":
        image_url = {"type": "object", "properties": {"image_url": _URL}, "required": ["image_url"]}
        return image_url, _FILE
    if name == "video":
        return _ID, {"anyOf": [_FILE, _ID]}
    known = {**_OPENAI, **_OF_THE_JOB}
    schema = known[name] if name in known else _inlined(TypeAdapter(HINTS[name]).json_schema())
    schema = schema | _EXAMPLES.get(name, {})
    return schema, schema


def _inlined(schema: Any, definitions: dict[str, Any] | None = None) -> Any:
    """A schema without references, as it stands for itself."""
    if isinstance(schema, list):
        return [_inlined(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    definitions = schema.get("$defs", definitions)
    if "$ref" in schema:
        return _inlined((definitions or {})[schema["$ref"].rpartition("/")[2]], definitions)
    return {key: _inlined(value, definitions) for key, value in schema.items() if key != "$defs"}
