"""Parameters of requests: every valid value is accepted, from JSON and from text."""

from typing import Any, Literal, get_args, get_origin

import pytest

from demucs_infer.options import OPTIONS, drop_inapplicable
from demucs_infer.server.errors import ApiError
from demucs_infer.server.schemas import parse_request

CHOICES = [
    (name, choice)
    for name, option in OPTIONS.items()
    if option.is_in("http")
    for part in get_args(option.hint)
    if get_origin(part) is Literal
    for choice in get_args(part)
    if choice not in option.setting.excluded.get("http", ())
]


@pytest.mark.parametrize(
    ("name", "value"),
    [*CHOICES, ("rate", 22050), ("rate", "22050"), ("bits", "16")],
)
def test_value_is_accepted(name: str, value: Any) -> None:
    request = parse_request({name: value})
    expected = int(value) if str(value).isdecimal() else value
    assert request.settings[name] == expected
    assert drop_inapplicable(request.settings)


@pytest.mark.parametrize("value", [0, "0", -1, "fast", 1.5, []])
def test_invalid_rate_is_refused(value: Any) -> None:
    with pytest.raises(ApiError, match="rate: Input.*; rate: Input"):
        parse_request({"rate": value})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stem", "stem: unknown parameter; did you mean stems?"),
        ("two-stems", "two-stems: unknown parameter; did you mean two_stems?"),
        ("kazoo", "kazoo: unknown parameter"),
        ("device", "device: not possible over HTTP; the operator of the server decides it"),
    ],
)
def test_unknown_parameter_suggests_the_right_one(name: str, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_request({name: "vocals"})
    assert caught.value.code == "invalid_parameters" and caught.value.message == message
