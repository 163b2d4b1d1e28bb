"""Requests and responses as data: validated here, described in /openapi.json."""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from demucs_infer.audio.formats import FORMATS
from demucs_infer.batch.request import SeparationRequest
from demucs_infer.server.errors import ApiError, from_exception

STEM_TEMPLATE = "{stem}.{ext}"
MIME_TYPES = {
    "wav": "audio/wav",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "ogg": "audio/ogg",
    "opus": "audio/opus",
    "m4a": "audio/mp4",
    "alac": "audio/mp4",
    "aiff": "audio/aiff",
    "caf": "audio/x-caf",
}
Name = Annotated[str, Field(min_length=1, max_length=200)]

# ── requests ──


class SeparateRequest(BaseModel):
    """The parameters of a request; all have defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: Name | None = Field(None, description="A name from /v1/models (default: the first).")
    stems: list[Name] | None = Field(
        None, max_length=32, description="Only these stems; only the work they need is done."
    )
    two_stems: Name | None = Field(None, description="This stem and the rest of the track.")
    other_method: Literal["add", "minus", "none"] = "add"
    derive: list[Name] = Field([], max_length=16, description="Such as drumless=mixture-drums.")
    format: Literal["wav", "flac", "mp3", "ogg", "opus", "m4a", "alac", "aiff", "caf"] = "wav"
    bits: Literal[16, 24, 32] | None = None
    bitrate: int | None = Field(None, ge=1, le=2000, description="In kbit/s.")
    shifts: int = Field(1, ge=0, le=1000)
    overlap: float = Field(0.25, ge=0, lt=1)
    segment: float | None = Field(None, ge=0.5, le=600, description="In seconds.")
    seed: int = Field(0, ge=-(2**63), lt=2**63)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    clip: Literal["track", "rescale", "clamp", "tanh", "none"] = "track"
    start: float = Field(0.0, ge=0, le=1e6, description="Seconds to skip at the beginning.")
    duration: float | None = Field(None, gt=0, le=1e6, description="Seconds to process at most.")
    no_cache: bool = Field(False, description="Separate again even if the result is cached.")

    def to_separation_request(
        self, *, max_passes: float, max_duration_seconds: float
    ) -> SeparationRequest:
        """Return the request for the batch runner; raise `ApiError` if it is invalid or too much.

        The network runs `shifts / (1 - overlap)` times over the track, at most `max_passes` times.
        """
        passes = max(self.shifts, 1) / (1 - self.overlap)
        if passes > max_passes:
            raise ApiError(
                "too_much_work",
                f"shifts and overlap need {passes:.0f} passes over the track (limit "
                f"{max_passes:g}): lower one of them",
            )
        # A second above the limit, so that a file longer than its header states is noticed.
        limit = max_duration_seconds + 1
        try:
            return SeparationRequest(
                shifts=self.shifts,
                overlap=self.overlap,
                segment=self.segment,
                seed=self.seed,
                precision=self.precision,
                stems=None if self.stems is None else tuple(self.stems),
                derive=tuple(self.derive),
                two_stems=self.two_stems,
                other_method=self.other_method,
                start=self.start,
                duration=min(self.duration or limit, limit),
                format=self.format,
                bits=self.bits,
                bitrate=self.bitrate if FORMATS[self.format].bitrates else None,
                clip=self.clip,
                template=STEM_TEMPLATE,
            )
        except ValueError as error:
            raise from_exception(error) from error


_LISTS = ("stems", "derive")
"""Fields that are lists in JSON, and text with commas in a form or a query."""


def add_field(fields: dict[str, str], name: str, value: str) -> None:
    """Add a field of a form or a query; only lists may be given in several parts."""
    if name in fields and name not in _LISTS:
        raise ApiError("invalid_parameters", f"{display_name(name)}: given twice, expected once")
    fields[name] = f"{fields[name]},{value}" if name in fields else value


def parse_request(fields: Mapping[str, Any]) -> SeparateRequest:
    """Validate parameters from JSON, a form or a query; the `ApiError` names each invalid one."""
    values: dict[str, Any] = dict(fields)
    for name in _LISTS:
        if isinstance(values.get(name), str):
            values[name] = [part.strip() for part in values[name].split(",") if part.strip()]
    bits = values.get("bits")
    if isinstance(bits, str) and bits.isdecimal():
        values["bits"] = int(bits)  # pydantic does not convert text for a Literal of numbers
    try:
        return SeparateRequest.model_validate(values)
    except ValidationError as error:
        raise from_exception(error) from error


def display_name(name: str | None) -> str:
    """Return a client's file name in a form that is safe to show; never use it as a path."""
    shown = "".join(c for c in (name or "") if c.isprintable() and not "\ud800" <= c <= "\udfff")
    return PurePosixPath(shown.replace("\\", "/")).name[:200] or "track"


class Instance(BaseModel):
    """A track."""

    b64: str = Field(description="The bytes of an audio file in base64.")


class PredictRequest(BaseModel):
    """The body of `POST /predict`, as Vertex AI defines it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"instances": [{"b64": "UklGRi..."}], "parameters": {"stems": ["vocals"]}}]
        }
    )

    instances: list[Instance] = Field(min_length=1)
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="The query parameters of POST /v1/separate, as JSON."
    )


# ── responses ──


class ErrorDetail(BaseModel):
    """What went wrong."""

    code: str = Field(examples=["unreadable_audio"])
    message: str


class ErrorBody(BaseModel):
    """The body of every error response."""

    error: ErrorDetail


class Health(BaseModel):
    """Whether the server accepts requests."""

    status: str = Field(examples=["healthy"])
    message: str = ""


class StemView(BaseModel):
    """A finished stem of a job."""

    name: str = Field(examples=["vocals"])
    file: str = Field(examples=["vocals.wav"])
    bytes: int
    url: str = Field(description="Relative to /v1/jobs/.")


class JobView(BaseModel):
    """The state of a job."""

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
    position: int | None = Field(None, description="Number of jobs ahead of this one.")
    seconds: float | None = Field(None, description="Processing time.")
    is_cached: bool = False
    stems: list[StemView] = []
    warnings: list[str] = []
    error: ErrorDetail | None = None


class ModelView(BaseModel):
    """An available model."""

    name: str
    stems: list[str] | None = Field(description="None until the model has been loaded once.")
    is_default: bool


class FormatView(BaseModel):
    """An available output format."""

    name: str
    is_lossy: bool
    type: str


class Capabilities(BaseModel):
    """The available models and formats, and the limits."""

    models: list[ModelView]
    formats: list[FormatView]
    max_bytes: int
    max_duration_seconds: float
    keep_seconds: float
    version: str


# ── descriptions for /openapi.json ──
#
# Bodies are read by hand: FastAPI's own parameters would hold a form or a JSON body completely,
# in memory or in a temporary file, before its size could be checked. What it therefore cannot
# derive from a signature is described here.


def _describe_prediction() -> dict[str, Any]:
    schema = PredictRequest.model_json_schema()
    schema["properties"]["instances"]["items"] = schema.pop("$defs")["Instance"]
    return {"requestBody": _body({"application/json": schema})}


def _describe_audio() -> dict[str, Any]:
    """Describe a form, and the raw body whose parameters are in the query."""
    properties = SeparateRequest.model_json_schema()["properties"]
    text = {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}
    file = {"type": "string", "format": "binary", "description": "The audio."}
    form = {
        "type": "object",
        "properties": {"file": file}
        | properties
        | {name: text | {"description": properties[name]["description"]} for name in _LISTS},
        "required": ["file"],
    }
    raw = {"type": "string", "format": "binary"}
    return {
        "requestBody": _body({"multipart/form-data": form, "application/octet-stream": raw}),
        "parameters": [
            {
                "name": name,
                "in": "query",
                "required": False,
                "description": f"For a raw body: {schema.get('description', name)}",
                "schema": {"type": "string"} if name in _LISTS else schema,
            }
            for name, schema in properties.items()
        ],
    }


def _body(schemas: dict[str, dict[str, Any]]) -> dict[str, Any]:
    content = {kind: {"schema": schema} for kind, schema in schemas.items()}
    return {"required": True, "content": content}


PREDICTION = _describe_prediction()
AUDIO = _describe_audio()


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe the error responses of a route; 401 and 403 are possible everywhere."""
    return {status: {"model": ErrorBody} for status in (401, 403, *statuses)}
