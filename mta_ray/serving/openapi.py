"""What /openapi.json says of each endpoint, made of the models that read and write the bodies.

Bodies are read by `schema.parse`, not by FastAPI: what stands here describes, and changes no answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import FastAPI, Path
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from mta_ray.serving.answers import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    ErrorAnswer,
    Health,
    Model,
    ModelList,
    StackAccepted,
    UserDeleted,
    UserView,
)
from mta_ray.serving.identity import ID_CHARS_MAX
from mta_ray.serving.schema import ALPHA_MAX, ChatRequest, CompletionRequest, HistoryRequest, Request

UserInPath = Annotated[
    str,
    Path(
        description="The user's id: any text, percent-encoded, slashes too.",
        json_schema_extra={"minLength": 1, "maxLength": ID_CHARS_MAX},
    ),
]
ERRORS = {
    400: "The request is wrong; `param` says where.",
    401: "No API key was given, or none that is known.",
    403: "No API key is configured, and the request comes from another machine.",
    404: "There is no such user, or no such model.",
    409: "The history is not what it was: not of `expected_version`, or changed meanwhile.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    429: "Too many requests for this key, or too many bodies of this tenant that have not come whole.",
    503: "There is no room now; send the request again.",
}
AT_THE_DOOR = (401, 403, 429)
RETRY_AFTER = {"Retry-After": {"description": "Seconds to wait.", "required": True, "schema": {"type": "integer"}}}
REF = "#/components/schemas/{model}"
BODIES = (ChatRequest, CompletionRequest, HistoryRequest)


def whole(app: FastAPI, model_name: str) -> dict[str, Any]:
    """FastAPI's description, with the bodies that it does not read and without the 422 that it never sends."""
    told = get_openapi(title=app.title, version=app.version, routes=app.routes)
    for path in told["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    parts = told["components"]
    for unused in ("HTTPValidationError", "ValidationError"):
        parts["schemas"].pop(unused, None)
    _, read = models_json_schema([(kind, "validation") for kind in BODIES], ref_template=REF)
    _, streamed = models_json_schema([(ChatCompletionChunk, "serialization")], ref_template=REF)
    parts["schemas"] |= read["$defs"] | streamed["$defs"]
    for kind in (ChatRequest, CompletionRequest):
        parts["schemas"][kind.__name__]["properties"]["model"]["enum"] = [model_name]
    parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return told


def _described(
    summary: str,
    answer: type[BaseModel],
    *,
    status: int = 200,
    errors: Sequence[int] = AT_THE_DOOR,
    body: type[Request] | None = None,
    file: str | None = None,
    query: dict[str, Any] | None = None,
    chunk: type[BaseModel] | None = None,
) -> dict[str, Any]:
    """Arguments of FastAPI's `add_api_route`. `chunk`: what an event of a stream holds, where one may be asked for."""
    responses: dict[int | str, dict[str, Any]] = {}
    if chunk is not None:
        responses[status] = {"content": {"text/event-stream": {"schema": _event(chunk)}}}
    for error in sorted(errors):
        responses[error] = {"description": ERRORS[error], "model": ErrorAnswer}
        if error in (429, 503):
            responses[error]["headers"] = RETRY_AFTER
    extra: dict[str, Any] = {}
    if 401 in errors:
        extra["security"] = [{"key": []}]
    if body is not None:
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(body)}}}
    if file is not None:
        extra["requestBody"] = {"required": True, "description": file, "content": {"application/octet-stream": {}}}
    extra["parameters"] = [{"name": name, "in": "query", "schema": schema} for name, schema in (query or {}).items()]
    return {
        "summary": summary,
        "response_model": answer,
        "status_code": status,
        "responses": responses,
        "openapi_extra": extra,
    }


def _event(chunk: type[BaseModel]) -> dict[str, Any]:
    """One event of a stream: a chunk, or an error that ends it, or the mark of its end."""
    kinds = [{"contentMediaType": "application/json", "contentSchema": _ref(kind)} for kind in (chunk, ErrorAnswer)]
    data = {"type": "string", "anyOf": [*kinds, {"const": "[DONE]"}]}
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}


def _ref(kind: type[BaseModel]) -> dict[str, str]:
    return {"$ref": REF.format(model=kind.__name__)}


CHAT = _described(
    "Answer a chat as the user's own model",
    ChatCompletion,
    body=ChatRequest,
    chunk=ChatCompletionChunk,
    errors=(*AT_THE_DOOR, 400, 404, 408, 413, 503),
)
COMPLETIONS = _described(
    "Continue a text as the user's own model",
    Completion,
    body=CompletionRequest,
    chunk=Completion,
    errors=(*AT_THE_DOOR, 400, 404, 408, 413, 503),
)
MODELS = _described("List the one model that is served", ModelList, errors=(*AT_THE_DOOR, 503))
MODEL = _described("Tell of the model by its name", Model, errors=(*AT_THE_DOOR, 404, 503))
PUT_HISTORY = _described(
    "Append to a user's history, or replace it",
    UserView,
    body=HistoryRequest,
    errors=(*AT_THE_DOOR, 400, 408, 409, 413, 503),
)
ASK_STACK = _described(
    "Have a user's own LoRA trained", StackAccepted, status=202, errors=(*AT_THE_DOOR, 400, 404, 503)
)
PUT_STACK = _described(
    "Put an adapter from elsewhere in the place of a user's own LoRA",
    UserView,
    file="PEFT's adapter_model.safetensors, of the rank that is served.",
    query={
        "alpha": {
            "type": "number",
            "exclusiveMinimum": 0,
            "maximum": ALPHA_MAX,
            "description": "lora_alpha of its adapter_config.json; left out: that of the stacks trained here.",
        },
        "base_fingerprint": {"type": "string", "description": "Of the base that it was trained on."},
    },
    errors=(*AT_THE_DOOR, 400, 404, 408, 409, 413, 503),
)
READ_USER = _described("Tell what a user's model is made of", UserView, errors=(*AT_THE_DOOR, 400, 404, 503))
DELETE_USER = _described("Delete a user, and everything kept of it", UserDeleted, errors=(*AT_THE_DOOR, 400, 404, 503))
HEALTHZ = _described("Tell that the service lives", Health, errors=())
READYZ = _described("Tell whether questions are answered", Health, errors=(503,))
