"""Test the conversion of arrays to float32 (C T), and the errors of invalid ones."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from demucs_infer.errors import DemucsError
from demucs_infer.sources import Audio, is_file, parse_sample_rate, to_samples

RAMP = np.linspace(-0.9, 0.9, 200, dtype=np.float32).reshape(2, 100)


@pytest.mark.parametrize(
    ("data", "tolerance"),
    [
        (RAMP, 0.0),
        (RAMP.T, 0.0),  # 100 is too many for channels: (T, C)
        (np.asfortranarray(RAMP), 0.0),
        (RAMP[:, ::-1][:, ::-1], 0.0),
        (RAMP.astype(">f4"), 0.0),
        (RAMP.astype(np.float64), 0.0),
        (torch.from_numpy(RAMP.copy()), 0.0),
        (torch.from_numpy(RAMP.copy()).requires_grad_(), 0.0),
        # Half a step of the narrower type, and half precision has 11 bits.
        (RAMP.astype(np.float16), 2.0**-11),
        (torch.from_numpy(RAMP.copy()).bfloat16(), 2.0**-8),
        (np.round(RAMP * 2**15).astype(np.int16), 2.0**-16),
        (np.round(RAMP.astype(np.float64) * 2**31).astype(np.int32), 2.0**-24),
        (np.round(RAMP * 2**7 + 128).astype(np.uint8), 2.0**-8),
    ],
)
def test_arrays_of_any_type_give_the_same_samples(data: Any, tolerance: float) -> None:
    wav = to_samples(data)
    assert wav.dtype is torch.float32
    assert wav.is_contiguous()
    assert not wav.requires_grad
    torch.testing.assert_close(wav, torch.from_numpy(RAMP), rtol=0, atol=tolerance)


def test_one_axis_is_mono() -> None:
    assert to_samples(RAMP[0]).shape == (1, 100)


def test_full_scale_of_integers_is_one() -> None:
    assert to_samples(np.array([-(2**15), 2**14], dtype=np.int16)).tolist() == [[-1.0, 0.5]]
    assert to_samples(np.array([0, 128, 192], dtype=np.uint8)).tolist() == [[-1.0, 0.0, 0.5]]


@pytest.mark.parametrize("kind", [np.float32, np.int16])
def test_samples_are_copied(kind: Any) -> None:
    data = (RAMP * 100).astype(kind)
    before = data.copy()
    data.flags.writeable = False
    to_samples(data).zero_()
    np.testing.assert_array_equal(data, before)
    tensor = torch.from_numpy(before.copy())
    to_samples(tensor).zero_()
    assert torch.equal(tensor, torch.from_numpy(before))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros((2, 0)), "empty"),
        (np.zeros(0), "empty"),
        (np.zeros((1, 2, 100)), "one by one"),
        (np.zeros((100, 100)), r"\(channels, samples\)"),
        (np.array(1.0), r"\(channels, samples\)"),
        (np.array([[0.0, np.nan]]), "nan_to_num"),
        (np.array([[0.0, np.inf]]), "infinite"),
        (np.array([[0.0, 1e300]]), "infinite"),
        (np.zeros((2, 9), dtype=np.int64), "int16"),
        (np.zeros((2, 9), dtype=bool), "int16"),
        (torch.zeros(2, 9, dtype=torch.complex64), "int16"),
        (np.array(["a"]), "float, int16"),
        ([[0.0, 1.0]], "numpy array"),
        (None, "numpy array"),
    ],
)
def test_invalid_arrays_are_errors(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        to_samples(data)
    assert isinstance(caught.value, DemucsError), "not an error of this package"


@pytest.mark.parametrize(
    "rate", [0, -1, 1, 10**9, 44100.5, "44100 Hz", None, float("nan"), float("inf")]
)
def test_invalid_sample_rates_are_errors(rate: Any) -> None:
    with pytest.raises(ValueError, match="samples per second"):
        parse_sample_rate(rate)


def test_sample_rate_may_have_any_number_type() -> None:
    assert parse_sample_rate(np.int64(8000)) == parse_sample_rate(8000.0) == 8000
    assert Audio(RAMP, 8000.0).sample_rate == 8000  # type: ignore[arg-type]  # what is tested


def test_files_are_distinguished_from_arrays() -> None:
    assert all(is_file(x) for x in ("a.wav", Path("a.wav"), b"RIFF", io.BytesIO(b"RIFF")))
    assert not any(is_file(x) for x in (RAMP, torch.zeros(3), Audio(RAMP, 8000), None, 3))
