"""What a client may ask for, checked before any work: `SeparateRequest` -> `SeparationRequest`."""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from demucs_infer.audio.formats import FORMATS
from demucs_infer.batch.request import SeparationRequest
from demucs_infer.server.errors import ApiError

Name = Annotated[str, Field(min_length=1, max_length=200)]
TEMPLATE = "{stem}.{ext}"

MIME = {
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


class SeparateRequest(BaseModel):
    """The parameters of a request; all have defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: Name | None = Field(None, description="One of /v1/models; the first by default.")
    stems: list[Name] | None = Field(
        None, max_length=32, description="Only these, and only the work that they need."
    )
    two_stems: Name | None = Field(None, description="This stem and the rest of the track.")
    other_method: Literal["add", "minus", "none"] = "add"
    derive: list[Name] = Field([], max_length=16, description="Such as drumless=mixture-drums.")
    format: Literal["wav", "flac", "mp3", "ogg", "opus", "m4a", "alac", "aiff", "caf"] = "wav"
    bits: Literal[16, 24, 32] | None = None
    bitrate: int | None = Field(None, ge=1, le=2000, description="kbit/s")
    shifts: int = Field(1, ge=0, le=1000)
    overlap: float = Field(0.25, ge=0, lt=1)
    segment: float | None = Field(None, ge=0.5, le=600, description="Seconds.")
    seed: int = Field(0, ge=-(2**63), lt=2**63)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    clip: Literal["track", "rescale", "clamp", "tanh", "none"] = "track"
    start: float = Field(0.0, ge=0, le=1e6, description="Seconds to leave out before.")
    duration: float | None = Field(None, gt=0, le=1e6, description="No more seconds than this.")
    no_cache: bool = Field(False, description="Compute, even if the same was computed before.")

    def order(self, *, max_passes: float, max_duration_seconds: float) -> SeparationRequest:
        """The same for the engine; `ApiError` if it is impossible or too much."""
        passes = max(self.shifts, 1) / (1 - self.overlap)
        if passes > max_passes:
            raise ApiError(
                422,
                "too_much_work",
                f"shifts and overlap ask for {passes:.0f} passes, and {max_passes:g} are allowed",
            )
        # A second more than is allowed shows that a file is longer than it says.
        limit = max_duration_seconds + 1
        kind = FORMATS[self.format]
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
                bitrate=self.bitrate if kind.bitrates else None,
                clip=self.clip,
                template=TEMPLATE,
            )
        except ValueError as error:
            raise ApiError(422, "invalid_parameters", str(error)) from error


def _as_text(name: str) -> Any:
    annotation = SeparateRequest.model_fields[name].annotation
    return (annotation, SeparateRequest.model_fields[name])


FormFields = create_model(  # the same as fields of a form, lists with commas
    "FormFields",
    file=(bytes, Field(..., description="The audio.", json_schema_extra={"format": "binary"})),
    **cast(
        Any,
        {
            name: (str | None, None) if name in ("stems", "derive") else _as_text(name)
            for name in SeparateRequest.model_fields
        },
    ),
)


_LISTS = ("stems", "derive")


def enter(fields: dict[str, str], name: str, value: str) -> None:
    """A field of a form or a query: lists may come piece by piece, nothing else comes twice."""
    if name in fields and name not in _LISTS:
        raise ApiError(422, "invalid_parameters", f"{display_name(name)}: is given twice")
    fields[name] = f"{fields[name]},{value}" if name in fields else value


def read_wish(fields: Mapping[str, Any]) -> SeparateRequest:
    """Parameters from JSON, a form or a query; `ApiError` names each that is wrong."""
    plain: dict[str, Any] = dict(fields)
    for name in _LISTS:
        if isinstance(plain.get(name), str):
            plain[name] = [part.strip() for part in plain[name].split(",") if part.strip()]
    bits = plain.get("bits")
    if isinstance(bits, str) and bits.isdecimal():
        plain["bits"] = int(bits)  # a Literal takes no text for a number
    try:
        return SeparateRequest.model_validate(plain)
    except ValidationError as error:
        raise ApiError(422, "invalid_parameters", explain(error)) from error


def explain(error: ValidationError) -> str:
    """What is wrong, one clause a field."""
    return "; ".join(
        f"{'.'.join(map(str, one['loc'])) or 'body'}: {one['msg']}"
        for one in error.errors(include_url=False, include_context=False)[:8]
    )


def display_name(name: str | None) -> str:
    """A client's file name for people to read; it never names a file here."""
    plain = "".join(c for c in (name or "") if c.isprintable() and not "\ud800" <= c <= "\udfff")
    return PurePosixPath(plain.replace("\\", "/")).name[:200] or "track"
