"""Networks behind the engine's interface: sound in, one sound per stem out, spectra between.

Shapes: B batch, S stems, C channels, W samples of a window, F bins, T frames; a last axis of 2 is
the real and the imaginary part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

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


def apply_mask(
    spectrum: Tensor,
    mask: Tensor,
    *,
    add_sub_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The product of two complex numbers (... 2), without complex numbers: (... 2).

    Products are added in `add_sub_dtype`. Either side may have axes of 1 where the other has more.
    """
    (a, b), (c, d) = spectrum.unbind(-1), mask.unbind(-1)
    ac, bd, ad, bc = (part.to(add_sub_dtype or part.dtype) for part in (a * c, b * d, a * d, b * c))
    product = torch.stack([ac - bd, ad + bc], dim=-1)
    return product.to(out_dtype or spectrum.dtype)


def model_floating_dtype(model: nn.Module) -> torch.dtype | None:
    """Of the first weight that is a real number; None where there is none."""
    found = (each.dtype for each in model.parameters() if each.is_floating_point())
    return next(found, None)


def to_model_device(
    tensor: Tensor,
    *,
    model_device: torch.device | str,
    model_floating_dtype: torch.dtype | None = None,
) -> Tensor:
    """`tensor` where the model is; as the model's kind of real number if it is one."""
    dtype = model_floating_dtype if tensor.is_floating_point() else None
    return tensor.to(device=model_device, dtype=dtype)


def str_to_torch_dtype(value: object) -> torch.dtype:
    """`torch.float16` from `"float16"`."""
    if not isinstance(value, str):
        raise TypeError(f"a dtype is named by text such as 'float16', not by {value!r}")
    if not hasattr(torch, value):
        raise ValueError(f"torch has no dtype {value!r}")
    dtype = getattr(torch, value)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"torch.{value} is not a dtype")
    return dtype


@dataclass(frozen=True, slots=True)
class Stft:
    """Spectra and the way back, as a configuration says; always in float32."""

    config: StftConfig

    def forward(self, wave: Tensor) -> Tensor:
        """(... W) -> (... F T 2)."""
        config, home = self.config, complex_device(wave.device)
        flat = wave.reshape(-1, wave.shape[-1]).to(home, torch.float32)
        z = torch.stft(
            flat,
            config.n_fft,
            config.hop_length,
            config.win_length,
            self._window(home),
            pad_mode=config.padding,
            normalized=config.normalized,
            return_complex=True,
        )
        parts = torch.view_as_real(z).to(wave.device)
        return parts.reshape(*wave.shape[:-1], *parts.shape[-3:])

    def inverse(self, parts: Tensor, length: int) -> Tensor:
        """(... F T 2) -> (... length)."""
        config, home = self.config, complex_device(parts.device)
        z = torch.view_as_complex(parts.to(home, torch.float32).contiguous())
        wave = torch.istft(
            z.reshape(-1, *z.shape[-2:]),
            config.n_fft,
            config.hop_length,
            config.win_length,
            self._window(home),
            normalized=config.normalized,
            length=length,
        )
        return wave.reshape(*z.shape[:-2], length).to(parts.device)

    def mask(self, parts: Tensor, mask: Tensor) -> Tensor:
        """(... F T 2) times (... F T), or times (... F T 2)."""
        if mask.ndim < parts.ndim:
            return parts * mask[..., None]
        if self.config.masking == "real":
            return apply_mask(parts, mask)
        home = complex_device(parts.device)
        one, other = (torch.view_as_complex(each.to(home).contiguous()) for each in (parts, mask))
        return torch.view_as_real(one * other).to(parts.device)

    def _window(self, device: torch.device) -> Tensor:
        return _window(self.config.window, self.config.win_length or self.config.n_fft, device)


@lru_cache(maxsize=16)
def _window(name: str, length: int, device: torch.device) -> Tensor:
    # An inference tensor in the cache would poison every later use under autograd.
    with torch.inference_mode(False):
        return make_window(name, length).to(device)


class WaveformModel(nn.Module):
    """Any network as the engine wants one; whatever else it is called with goes through."""

    def __init__(
        self,
        model: nn.Module,
        traits: Traits,
        *,
        sample_rate: int = 44100,
        channels: int | None = None,
        chunk_size: int | None = None,
        stft: StftConfig | None = None,
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
        self.preferences: dict[str, object] = {}
        """What a `Separator` does for it unless told otherwise."""
        problems = [*_contradictions(model, self), *_missing_spectra(traits, stft, self.chunk_size)]
        if problems:
            raise ConfigError("\n".join(problems))

    def valid_length(self, length: int) -> int:
        """A short chunk borrows what is around it: the network always reads a whole window."""
        return max(length, self.chunk_size)

    def forward(self, mix: Tensor, **arguments: object) -> Tensor:
        """(B C W) -> (B S C W)."""
        dtype = model_floating_dtype(self.model)
        spectrum = self.stft.forward(mix) if self.stft is not None else None
        answer = self.ask(
            *(
                to_model_device(each, model_device=each.device, model_floating_dtype=dtype)
                for each in self._inputs(mix, spectrum)
            ),
            **arguments,
        )
        if self.traits.output_type == "waveform" or self.stft is None or spectrum is None:
            return as_tensor(answer, self.sources).float()
        return self.stft.inverse(self._spectra(answer, spectrum), mix.shape[-1])

    def ask(self, *inputs: Tensor, **arguments: object) -> object:
        """What the network itself says: the part that a compiler is given."""
        return self.model(*inputs, **arguments)

    def _inputs(self, mix: Tensor, spectrum: Tensor | None) -> list[Tensor]:
        if self.stft is None or spectrum is None or self.traits.input_type == "waveform":
            return [mix]
        if self.stft.config.spectrum == "magnitude":
            spectrum = spectrum.pow(2).sum(-1).sqrt()
        return [spectrum] if self.traits.input_type == "spectrogram" else [mix, spectrum]

    def _spectra(self, answer: object, spectrum: Tensor) -> Tensor:
        """What the network answered as spectra of the stems: (B S C F T 2)."""
        assert self.stft is not None
        if self.traits.output_type == "spectrogram":
            return as_tensor(answer, self.sources, SPECTRUM).float()
        first: Sequence[str] = MAGNITUDE if self.stft.config.spectrum == "magnitude" else SPECTRUM
        return self.stft.mask(spectrum[:, None], as_tensor(answer, self.sources, first).float())


def create_w2w_model(
    model: nn.Module,
    params: object,
    *,
    stft: StftConfig | None = None,
    sample_rate: int = 44100,
    channels: int | None = None,
    chunk_size: int | None = None,
) -> WaveformModel:
    """`model` from sound to sound, whatever its `params` say that it reads and answers."""
    return WaveformModel(
        model,
        Traits.of(params),
        sample_rate=sample_rate,
        channels=channels,
        chunk_size=chunk_size,
        stft=stft,
    )


def _contradictions(model: nn.Module, outside: WaveformModel) -> list[str]:
    """Where a network says of itself what the configuration says otherwise."""
    found = []
    for name, key in (
        ("samplerate", "audio.sample_rate"),
        ("audio_channels", "audio.channels"),
        ("sources", "model.output_stem_names"),
    ):
        asked = getattr(outside, name)
        own = getattr(model, name, asked)
        own = list(own) if isinstance(own, list | tuple) else own
        if own != asked:
            found.append(f"{key}: {asked} is not the network's {own}")
    own_rate = outside.traits.sample_rate
    if own_rate not in (None, outside.samplerate):
        text = f"{outside.samplerate} is not the {own_rate} of the model's parameters"
        found.append(f"audio.sample_rate: {text}")
    return found


def _missing_spectra(traits: Traits, stft: StftConfig | None, chunk_size: int) -> list[str]:
    if not traits.needs_stft:
        return [] if stft is None else ["stft: the network neither reads nor answers spectra"]
    if stft is None:
        return [f"stft: is missing, for a network from {traits.input_type} to {traits.output_type}"]
    found = []
    if chunk_size <= stft.n_fft // 2:
        found.append(f"stft.n_fft: {stft.n_fft} is too long for a window of {chunk_size} samples")
    if traits.output_type == "spectrogram" and stft.spectrum == "magnitude":
        found.append("stft.spectrum: magnitudes have no phase to make sound of; answer a mask")
    return found
