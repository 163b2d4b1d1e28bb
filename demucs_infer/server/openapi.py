"""The shapes of requests and answers, as /openapi.json tells them."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from demucs_infer.server.schemas import FormFields, SeparateRequest


class Instance(BaseModel):
    """A track."""

    b64: str = Field(description="The bytes of an audio file in base64.")


class PredictRequest(BaseModel):
    """What `POST /predict` takes: the contract of Vertex AI."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"instances": [{"b64": "UklGRi..."}], "parameters": {"stems": ["vocals"]}}]
        }
    )

    instances: list[Instance] = Field(min_length=1)
    parameters: dict[str, Any] = Field(default_factory=dict, description="See the schema Wish.")


class ErrorDetail(BaseModel):
    """What went wrong."""

    code: str = Field(examples=["unreadable_audio"])
    message: str


class ErrorBody(BaseModel):
    """Every answer that is no success."""

    error: ErrorDetail


class Health(BaseModel):
    """Whether requests are taken."""

    status: str = Field(examples=["healthy"])
    message: str = ""


class StemView(BaseModel):
    """A finished stem of a job."""

    name: str = Field(examples=["vocals"])
    file: str = Field(examples=["vocals.wav"])
    bytes: int
    url: str = Field(description="Relative to the job's own address.")


class JobView(BaseModel):
    """A job as it stands."""

    id: str
    status: str = Field(examples=["queued", "running", "done", "failed", "cancelled"])
    name: str
    model: str
    format: str
    created: float = Field(description="Seconds since 1970.")
    expires: float | None = None
    progress: float = Field(ge=0, le=1)
    stage: str = ""
    seconds_left: float | None = None
    position: int | None = Field(None, description="How many jobs are before it.")
    seconds: float | None = Field(None, description="How long the work took.")
    is_cached: bool = False
    stems: list[StemView] = []
    warnings: list[str] = []
    error: ErrorDetail | None = None


class ModelView(BaseModel):
    """A model that may be asked for."""

    name: str
    stems: list[str] | None = Field(description="None until it has been loaded once.")
    is_default: bool


class FormatView(BaseModel):
    """A kind of file that may be asked for."""

    name: str
    is_lossy: bool
    type: str


class Capabilities(BaseModel):
    """What there is to choose from, and the limits."""

    models: list[ModelView]
    formats: list[FormatView]
    max_bytes: int
    max_duration_seconds: float
    keep_seconds: float
    version: str


def schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a model in one piece: nothing in it refers to elsewhere."""
    found = model.model_json_schema()
    return dict(_resolved(found, found.pop("$defs", {})))


def _resolved(node: Any, known: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_resolved(one, known) for one in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _resolved(known[node["$ref"].rpartition("/")[2]], known)
    return {name: _resolved(one, known) for name, one in node.items()}


def body(**content: dict[str, Any]) -> dict[str, Any]:
    """The description of a body that is read by hand."""
    kinds = {
        name.replace("__", "/").replace("_", "-"): {"schema": one} for name, one in content.items()
    }
    return {"requestBody": {"required": True, "content": kinds}}


PREDICTION = body(application__json=schema(PredictRequest))
AUDIO = body(
    multipart__form_data=schema(FormFields),
    application__octet_stream={"type": "string", "format": "binary"},
)
AUDIO["parameters"] = [
    {
        "name": name,
        "in": "query",
        "required": False,
        "description": f"For a raw body: {one.description or name}",
        "schema": {"type": "string"} if name in ("stems", "derive") else one_schema,
    }
    for (name, one), one_schema in zip(
        SeparateRequest.model_fields.items(),
        schema(SeparateRequest)["properties"].values(),
        strict=True,
    )
]


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The answers that are no success, for the documentation."""
    return {status: {"model": ErrorBody} for status in (401, 403, *statuses)}
