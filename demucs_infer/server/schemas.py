"""Requests and responses as data: validated here, described in /openapi.json."""

from collections.abc import Mapping
from contextlib import suppress
from http import HTTPStatus
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from demucs_infer.batch.request import ModelSpec
from demucs_infer.options import OPTIONS, Option, Request, drop_inapplicable
from demucs_infer.server.errors import ApiError, describe_invalid_fields, from_exception

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
REMOTE_FIELDS = {
    "url": "URL of the track, in place of a file: https, s3 or gs, where the operator allows it.",
    "output": "URL of a folder that the stems are copied to, where the operator allows it.",
    "webhook": "URL to which the finished job is sent, where the operator allows it.",
}
"""The fields of a request that are URLs."""


# ── requests ──


class SeparateRequest(BaseModel):
    """The parameters of a request, all with defaults: the settings of `options.py`, and these."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: Name | None = Field(None, description="A name from /v1/models (default: the first).")
    no_cache: bool = Field(False, description="Separate again even if the result is cached.")

    @property
    def settings(self) -> dict[str, object]:
        """The settings that the client has set, by name, as `options.py` has them."""
        values = self.model_dump(exclude={"model", "no_cache"}, exclude_unset=True)
        return {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }

    def to_request(
        self, model: ModelSpec, *, max_passes: float, max_duration_seconds: float
    ) -> Request:
        """Return the request for the batch runner; raise `ApiError` if it is invalid or too much.

        What the client has not set is as `model` has it. The network runs `shifts / (1 - overlap)`
        times over the track, at most `max_passes` times.
        """
        try:
            settings = drop_inapplicable(model.fill_settings(self.settings))
            request = Request().replace(settings)
            # A second above the limit, so that a file longer than its header states is noticed.
            limit = max_duration_seconds + 1
            duration = min(request.input.duration or limit, limit)
            request = request.replace({"duration": duration, "template": STEM_TEMPLATE})
        except ValueError as error:
            raise from_exception(error) from error
        separation = request.separation
        passes = max(separation.shifts, 1) / (1 - separation.overlap)
        if passes > max_passes:
            raise ApiError(
                "too_much_work",
                f"shifts and overlap need {passes:.0f} passes over the track (limit "
                f"{max_passes:g}): lower one of them",
            )
        return request


def _make_field(option: Option) -> Any:
    """Return the type and the description of a setting, as pydantic takes them."""
    setting = option.limited_to("http").setting
    limits = {name: getattr(setting, name) for name in ("ge", "gt", "le", "lt")}
    limits |= {"max_length": setting.limits.get("http", {}).get("max_length")}
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    kinds: dict[type, Any] = {tuple: list[Name], str: Name}
    excluded = setting.excluded.get("http", ())
    if option.types and option.types[0] in kinds:
        kind = kinds[option.types[0]]
        hint = kind | None if option.is_optional else kind
    elif excluded:
        hint = Literal[tuple(choice for choice in option.choices if choice not in excluded)]
    else:
        hint = option.hint
        words = [part for part in get_args(hint) if get_origin(part) is Literal]
        if limits and words:  # pydantic would compare the words with the limits, too
            rest: Any = Union[tuple({*get_args(hint)} - {*words})]  # noqa: UP007 (of a tuple)
            hint, limits = Union[(Annotated[rest, Field(**limits)], *words)], {}
    default = [] if option.default == () else option.default
    return hint, Field(default, description=setting.help, **limits)


RequestSchema = create_model(
    "SeparateRequest",
    __base__=SeparateRequest,
    **{option.name: _make_field(option) for option in OPTIONS.values() if option.is_in("http")},
)
"""`SeparateRequest` with every setting that a client may choose."""


_LISTS = ("stems", "derive")
"""Fields that are lists in JSON, and text with commas in a form or a query."""


_TIMES_AND_FRACTIONS = {
    option.name
    for option in OPTIONS.values()
    if option.setting.is_time or option.setting.is_fraction
}
"""Fields that are numbers in JSON, and also take text such as `1:30` or `25%`."""


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
    for name in _TIMES_AND_FRACTIONS & values.keys():
        if isinstance(values[name], str):
            with suppress(ValueError):  # pydantic reports what is wrong
                values[name] = OPTIONS[name].parse(values[name])
    bits = values.get("bits")
    if isinstance(bits, str) and bits.isdecimal():
        values["bits"] = int(bits)  # pydantic does not convert text for a Literal of numbers
    try:
        return RequestSchema.model_validate(values)
    except ValidationError as error:
        message = describe_invalid_fields(error, RequestSchema.model_fields)
        raise from_exception(error, message) from error


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


class InferInput(BaseModel):
    """A tensor of one element: the bytes of an audio file in base64."""

    name: str = "audio"
    datatype: Literal["BYTES"]
    shape: list[int] = Field(min_length=1, max_length=2)
    data: list[str] = Field(min_length=1, max_length=1)


class InferOutput(BaseModel):
    """A stem that is requested."""

    name: str


class InferRequest(BaseModel):
    """The body of `POST /v2/models/{name}/infer`, the open inference protocol."""

    id: str | None = Field(None, max_length=200)
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="The query parameters of POST /v1/separate, as JSON."
    )
    inputs: list[InferInput] = Field(min_length=1, max_length=1)
    outputs: list[InferOutput] = Field([], description="The stems to return (default: all).")

    @property
    def separation_parameters(self) -> dict[str, Any]:
        """The parameters, with the requested outputs as stems."""
        stems = [output.name for output in self.outputs]
        return {"stems": stems, **self.parameters} if stems else self.parameters


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
    url: str = Field(
        description="The path on this server.", examples=["/v1/jobs/4c1d/stems/vocals"]
    )


class PreviewView(BaseModel):
    """Stems that can be listened to, complete or not; see /v1/jobs/{id}/stems/{name}/part."""

    stems: list[str]
    sample_rate: int
    available_seconds: float = Field(description="What can be read now.")
    duration_seconds: float | None = Field(description="Of the track; None while it is read.")


class DownloadView(BaseModel):
    """How much of a track has been downloaded."""

    received_bytes: int
    total_bytes: int | None = Field(description="None if the other server does not state it.")


class JobView(BaseModel):
    """The state of a job."""

    id: str
    status: str = Field(
        examples=["downloading", "queued", "running", "done", "failed", "cancelled"]
    )
    name: str
    input_sha256: str = Field(
        description="Of the track, as in stems.json; empty while it is downloaded."
    )
    model: str
    format: str
    created: float = Field(description="Seconds since 1970.")
    expires: float | None = None
    progress: float = Field(ge=0, le=1)
    stage: str = Field(
        "",
        description="download (the track), fetch (the model), load (the model), read, separate, "
        "save, upload (the stems, to the output); empty while the job waits, and at its end.",
    )
    download: DownloadView | None = Field(None, description="Of a track that is downloaded.")
    seconds_left: float | None = None
    position: int | None = Field(None, description="Number of jobs ahead of this one.")
    seconds: float | None = Field(None, description="Processing time.")
    is_cached: bool = False
    shared_id: str | None = Field(
        None, description="Of a finished job, if the server allows links: an id to read it by."
    )
    stems: list[StemView] = []
    output: str | None = Field(None, description="URL of the folder with the stems.")
    preview: PreviewView | None = None
    warnings: list[str] = []
    error: ErrorDetail | None = None


class JobList(BaseModel):
    """The jobs of a client, the newest first."""

    jobs: list[JobView]


class Waveform(BaseModel):
    """The peaks of a stem in columns of equal length, 0 to 1 and above where it would clip."""

    peaks: list[float]
    available_seconds: float
    duration_seconds: float


class ModelView(BaseModel):
    """An available model."""

    name: str
    stems: list[str] | None = Field(description="None until the model has been loaded once.")
    is_default: bool
    state: str = Field(examples=["loaded", "unloaded"])


class InferServerView(BaseModel):
    """The server, as the open inference protocol describes it."""

    name: str
    version: str
    extensions: list[str] = []


class InferTensorView(BaseModel):
    """An input or an output of a model: a file in base64."""

    name: str
    datatype: str = "BYTES"
    shape: list[int] = [1]


class InferModelView(BaseModel):
    """A model, as the open inference protocol describes it."""

    name: str
    versions: list[str] = ["1"]
    platform: str = "demucs-infer"
    inputs: list[InferTensorView]
    outputs: list[InferTensorView]


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


def _describe_audio(*remote_fields: str) -> dict[str, Any]:
    """Describe a form, JSON, and the raw body whose parameters are in the query."""
    properties = RequestSchema.model_json_schema()["properties"]
    properties |= {
        name: {"type": "string", "description": REMOTE_FIELDS[name]} for name in remote_fields
    }
    text = {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}
    file = {"type": "string", "format": "binary", "description": "The audio."}
    form = {
        "type": "object",
        "properties": {"file": file}
        | properties
        | {name: text | {"description": properties[name]["description"]} for name in _LISTS},
    }
    by_url = {"type": "object", "properties": properties, "required": ["url"]}
    raw = {"type": "string", "format": "binary"}
    return {
        "requestBody": _body(
            {
                "multipart/form-data": form,
                "application/json": by_url,
                "application/octet-stream": raw,
            }
        ),
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


def _describe_inference() -> dict[str, Any]:
    schema = InferRequest.model_json_schema()
    kinds = schema.pop("$defs")
    schema["properties"]["inputs"]["items"] = kinds["InferInput"]
    schema["properties"]["outputs"]["items"] = kinds["InferOutput"]
    return {"requestBody": _body({"application/json": schema})}


PREDICTION = _describe_prediction()
INFERENCE = _describe_inference()
AUDIO = _describe_audio("url")
JOB = _describe_audio(*REMOTE_FIELDS)


_COMPONENTS = "#/components/schemas/"
SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe the error responses of a route, with those that are possible everywhere."""
    content = {"application/json": {"schema": {"$ref": f"{_COMPONENTS}ErrorBody"}}}
    return {
        status: {"description": HTTPStatus(status).phrase, "content": content}
        for status in (401, 403, 421, 422, 503, *statuses)
    }


def add_shared_schemas(schema: dict[str, Any]) -> None:
    """Add what no route declares to the schema of /openapi.json."""
    error = ErrorBody.model_json_schema(ref_template=f"{_COMPONENTS}{{model}}")
    components = schema.setdefault("components", {})
    components.setdefault("schemas", {}).update(error.pop("$defs") | {"ErrorBody": error})
    components["securitySchemes"] = SECURITY_SCHEMES
