"""Wrap any network so that it takes a waveform and returns a waveform per stem.

Shapes: B batch, S stems, C channels, W samples of a window, F bins, T frames; a last axis of 2
contains the real and the imaginary part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor, nn

from demucs_infer.custom.config import StftConfig
from demucs_infer.custom.metadata import Traits
from demucs_infer.engine.network import as_tensor
from demucs_infer.engine.stitch import make_window
from demucs_infer.errors import ConfigError
from demucs_infer.spec import complex_device

SPECTRUM = ("batch", "stems", "channels", "bins", "frames", "2 parts")
MAGNITUDE = SPECTRUM[:-1]

Preprocess: TypeAlias = Callable[..., Tensor | Sequence[Tensor]]
Postprocess: TypeAlias = Callable[..., object]


def apply_mask(
    spectrum: Tensor,
    mask: Tensor,
    add_sub_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply two complex tensors (..., 2) without complex dtypes, with broadcasting.

    The products are added in `add_sub_dtype` (None: their own). The result has `out_dtype` (None:
    that of `spectrum`).
    """
    (a, b), (c, d) = spectrum.unbind(-1), mask.unbind(-1)
    ac, bd, ad, bc = (part.to(add_sub_dtype or part.dtype) for part in (a * c, b * d, a * d, b * c))
    product = torch.stack([ac - bd, ad + bc], dim=-1)
    return product.to(out_dtype or spectrum.dtype)


def model_floating_dtype(model: nn.Module) -> torch.dtype | None:
    """Return the dtype of the first floating-point parameter; None if there is none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def to_model_device(
    tensor: Tensor,
    *,
    model_device: torch.device | str,
    model_floating_dtype: torch.dtype | None = None,
) -> Tensor:
    """Move `tensor` to the model's device; cast it to the model's dtype if it is floating-point."""
    dtype = model_floating_dtype if tensor.is_floating_point() else None
    return tensor.to(device=model_device, dtype=dtype)


def str_to_torch_dtype(value: object) -> torch.dtype:
    """Return the dtype of a name: `torch.float16` for `"float16"`."""
    if not isinstance(value, str):
        raise TypeError(f"expected the name of a dtype such as 'float16', got {value!r}")
    if not hasattr(torch, value):
        raise ValueError(f"torch has no dtype {value!r}")
    dtype = getattr(torch, value)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"torch.{value} is not a dtype")
    return dtype


@dataclass(frozen=True, slots=True)
class Stft:
    """Short-time Fourier transform and its inverse, always in float32."""

    config: StftConfig

    def forward(self, wave: Tensor) -> Tensor:
        """Transform (..., W) -> (..., F, T, 2)."""
        config, device = self.config, complex_device(wave.device)
        flat = wave.reshape(-1, wave.shape[-1]).to(device, torch.float32)
        z = torch.stft(
            flat,
            config.n_fft,
            config.hop_length,
            config.win_length,
            self._window(device),
            pad_mode=config.padding,
            normalized=config.normalized,
            return_complex=True,
        )
        parts = torch.view_as_real(z).to(wave.device)
        return parts.reshape(*wave.shape[:-1], *parts.shape[-3:])

    def inverse(self, parts: Tensor, length: int) -> Tensor:
        """Transform (..., F, T, 2) -> (..., length)."""
        config, device = self.config, complex_device(parts.device)
        z = torch.view_as_complex(parts.to(device, torch.float32).contiguous())
        wave = torch.istft(
            z.reshape(-1, *z.shape[-2:]),
            config.n_fft,
            config.hop_length,
            config.win_length,
            self._window(device),
            normalized=config.normalized,
            length=length,
        )
        return wave.reshape(*z.shape[:-2], length).to(parts.device)

    def mask(self, parts: Tensor, mask: Tensor) -> Tensor:
        """Multiply a spectrum (..., F, T, 2) by a mask, which is complex, or real (..., F, T)."""
        if mask.ndim < parts.ndim:
            return parts * mask[..., None]
        if self.config.masking == "real":
            return apply_mask(parts, mask)
        device = complex_device(parts.device)
        z, factor = (torch.view_as_complex(x.to(device).contiguous()) for x in (parts, mask))
        return torch.view_as_real(z * factor).to(parts.device)

    def _window(self, device: torch.device) -> Tensor:
        return _window(self.config.window, self.config.win_length or self.config.n_fft, device)


@lru_cache(maxsize=16)
def _window(name: str, length: int, device: torch.device) -> Tensor:
    # A cached inference tensor would fail under autograd later.
    with torch.inference_mode(False):
        return make_window(name, length).to(device)


class WaveformModel(nn.Module):
    """A network with the interface that the engine expects.

    `preprocess` receives what the network would read (waveform, spectrum or both) and returns the
    tensors to call it with. `postprocess` receives the output of the network, then those tensors,
    and returns the stems, or their spectra or masks if that is the output type of `traits`.
    """

    def __init__(
        self,
        model: nn.Module,
        traits: Traits,
        *,
        sample_rate: int = 44100,
        channels: int | None = None,
        chunk_size: int | None = None,
        stft: StftConfig | None = None,
        preprocess: Preprocess | None = None,
        postprocess: Postprocess | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.traits = traits
        self.sources = list(traits.output_stem_names)
        self.samplerate = sample_rate
        self.audio_channels = traits.input_channels if channels is None else channels
        self.chunk_size = traits.chunk_size if chunk_size is None else chunk_size
        self.segment = Fraction(self.chunk_size, sample_rate)
        self.stft = None if stft is None else Stft(stft)
        self.preprocess = preprocess
        self.postprocess = postprocess
        self.preferences: dict[str, object] = {}
        """Default options of a `Separator` for this network."""
        self.own_settings: dict[str, object] = {}
        """Settings of its windows in a bag of networks with different stems."""
        problems = [
            *_find_conflicts(model, self),
            *_find_stft_problems(traits, stft, self.chunk_size),
        ]
        if problems:
            raise ConfigError("\n".join(problems))

    @property
    def model_input_dtype(self) -> torch.dtype | None:
        """The dtype that inputs are cast to; None: they are not cast."""
        return model_floating_dtype(self.model)

    def valid_length(self, length: int) -> int:
        """Return the input length for a chunk: a short chunk is extended to `chunk_size`.

        A longer one is extended to a length that the network can process.
        """
        if length <= self.chunk_size:
            return self.chunk_size
        hop, unit = getattr(self.model, "length_grid", (0, 1))
        return -(-(length + hop) // unit) * unit - hop

    def forward(self, mix: Tensor, **arguments: object) -> Tensor:
        """Separate (B, C, W) -> (B, S, C, W)."""
        spectrum = self.stft.forward(mix) if self.stft is not None else None
        inputs = self._inputs(mix, spectrum)
        if self.preprocess is not None:
            result = self.preprocess(*inputs)
            inputs = [result] if isinstance(result, Tensor) else list(result)
        dtype = self.model_input_dtype
        inputs = [
            to_model_device(x, model_device=x.device, model_floating_dtype=dtype) for x in inputs
        ]
        output = self.run_network(*inputs, **arguments)
        if self.postprocess is not None:
            output = self.postprocess(output, *inputs)
        if self.traits.output_type == "waveform" or self.stft is None or spectrum is None:
            return as_tensor(output, self.sources).float()
        return self.stft.inverse(self._stem_spectra(output, spectrum), mix.shape[-1])

    def run_network(self, *inputs: Tensor, **arguments: object) -> object:
        """Call the network itself; `torch.compile` is applied to this method."""
        return self.model(*inputs, **arguments)

    def _inputs(self, mix: Tensor, spectrum: Tensor | None) -> list[Tensor]:
        if self.stft is None or spectrum is None or self.traits.input_type == "waveform":
            return [mix]
        if self.stft.config.spectrum == "magnitude":
            spectrum = spectrum.pow(2).sum(-1).sqrt()
        return [spectrum] if self.traits.input_type == "spectrogram" else [mix, spectrum]

    def _stem_spectra(self, output: object, spectrum: Tensor) -> Tensor:
        """Convert the output of the network to spectra of the stems, (B, S, C, F, T, 2)."""
        assert self.stft is not None
        if self.traits.output_type == "spectrogram":
            return as_tensor(output, self.sources, SPECTRUM).float()
        axes: Sequence[str] = MAGNITUDE if self.stft.config.spectrum == "magnitude" else SPECTRUM
        return self.stft.mask(spectrum[:, None], as_tensor(output, self.sources, axes).float())


def create_w2w_model(
    model: nn.Module,
    params: object,
    *,
    stft: StftConfig | None = None,
    sample_rate: int = 44100,
    channels: int | None = None,
    chunk_size: int | None = None,
    preprocess: Preprocess | None = None,
    postprocess: Postprocess | None = None,
) -> WaveformModel:
    """Wrap `model`, according to `params`, so that it takes and returns waveforms.

    See `WaveformModel` for `preprocess` and `postprocess`. Raises `ConfigError` if the model, the
    parameters and the arguments contradict each other.
    """
    return WaveformModel(
        model,
        Traits.from_params(params),
        sample_rate=sample_rate,
        channels=channels,
        chunk_size=chunk_size,
        stft=stft,
        preprocess=preprocess,
        postprocess=postprocess,
    )


def _find_conflicts(model: nn.Module, wrapper: WaveformModel) -> list[str]:
    """Return the attributes of a network that differ from the configuration."""
    problems = []
    for name, key in (
        ("samplerate", "audio.sample_rate"),
        ("audio_channels", "audio.channels"),
        ("sources", "model.output_stem_names"),
    ):
        configured = getattr(wrapper, name)
        actual = getattr(model, name, configured)
        actual = list(actual) if isinstance(actual, list | tuple) else actual
        if actual != configured:
            problems.append(f"{key}: the network has {actual}, got {configured}")
    rate = wrapper.traits.sample_rate
    if rate not in (None, wrapper.samplerate):
        problems.append(
            f"audio.sample_rate: the model's parameters have {rate}, got {wrapper.samplerate}"
        )
    return problems


def _find_stft_problems(traits: Traits, stft: StftConfig | None, chunk_size: int) -> list[str]:
    if not traits.needs_stft:
        return (
            []
            if stft is None
            else ["stft: not used by a network from waveform to waveform: omit it"]
        )
    if stft is None:
        return [f"stft: required for a network from {traits.input_type} to {traits.output_type}"]
    problems = []
    if chunk_size <= stft.n_fft // 2:
        problems.append(
            f"stft.n_fft: must be below twice the window of {chunk_size} samples, got {stft.n_fft}"
        )
    if traits.output_type == "spectrogram" and stft.spectrum == "magnitude":
        problems.append(
            "stft.spectrum: a magnitude has no phase to resynthesize from: use 'parts', "
            "or output_type 'spectrogram_mask'"
        )
    return problems
