"""Demucs (v1, v2, and the time branch of v3 by itself): a U-Net on the waveform.

Shapes: B batch, S sources, C channels, W samples of the window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demucs_infer.layers import BLSTM, DConv, DConvConfig, group_norm

_ZEROS = 24
"""Zero crossings of the resampling filter on each side."""
_ROLLOFF = 0.945
"""Its cut-off, as a fraction of the lower of the two Nyquist frequencies."""


@lru_cache(maxsize=8)
def _sinc_filters(old: int, new: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One windowed sinc for each of the `new` phases between two input periods: (new 1 taps)."""
    # An inference tensor in the cache would poison every later use under autograd.
    with torch.inference_mode(False):
        rate = min(old, new) * _ROLLOFF
        reach = _reach(old, new)
        taps = torch.arange(-reach, reach + old, device="cpu").float()
        filters = []
        for phase in range(new):
            t = ((-phase / new + taps / old) * rate).clamp(-_ZEROS, _ZEROS) * math.pi
            sinc = torch.where(t == 0, torch.ones_like(t), torch.sin(t) / t)
            weights = sinc * torch.cos(t / _ZEROS / 2) ** 2
            filters.append(weights / weights.sum())  # a constant stays what it is
        return torch.stack(filters)[:, None].to(device, dtype)


def _reach(old: int, new: int) -> int:
    """Input samples that the filter sees on each side."""
    return math.ceil(_ZEROS * old / (min(old, new) * _ROLLOFF))


def resample(x: Tensor, old: int, new: int) -> Tensor:
    """Change the rate by new / old, a small ratio of coprime integers: (B C W) -> (B C W')."""
    batch, channels, length = x.shape
    reach = _reach(old, new)
    x = F.pad(x.reshape(-1, 1, length), (reach, reach + old), mode="replicate")
    y = F.conv1d(x, _sinc_filters(old, new, x.dtype, x.device), stride=old)
    y = y.transpose(1, 2).reshape(batch, channels, -1)
    return y[..., : new * length // old]


def _centre(x: Tensor, length: int) -> Tensor:
    """The `length` steps in the middle; an odd one too many goes on the right."""
    start = (x.shape[-1] - length) // 2
    return x[..., start : start + length]


@dataclass(frozen=True, slots=True, kw_only=True)
class _WaveLevel:
    """One level of the ladder: what its encoder and its decoder have in common."""

    fine: int
    coarse: int
    kernel_size: int
    stride: int
    norm_groups: int | None
    gelu: bool
    gate: int | None
    """Factor of channels in front of the rewriting activation; None: no rewriting."""
    context: int
    dconv_encoder: DConvConfig | None
    dconv_decoder: DConvConfig | None

    def encoder(self) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv1d(self.fine, self.coarse, self.kernel_size, self.stride),
            group_norm(self.norm_groups, self.coarse),
            self._activation(),
            *self._residual(self.dconv_encoder),
            *self._rewrite(0),
        )

    def decoder(self, channels_out: int, last: bool) -> nn.Sequential:
        up = nn.ConvTranspose1d(self.coarse, channels_out, self.kernel_size, self.stride)
        end = [] if last else [group_norm(self.norm_groups, channels_out), self._activation()]
        return nn.Sequential(
            *self._rewrite(self.context), *self._residual(self.dconv_decoder), up, *end
        )

    def _activation(self) -> nn.Module:
        return nn.GELU() if self.gelu else nn.ReLU()

    def _residual(self, config: DConvConfig | None) -> Iterator[nn.Module]:
        if config is not None:
            yield DConv(self.coarse, config)

    def _rewrite(self, context: int) -> Iterator[nn.Module]:
        if self.gate is None:
            return
        yield nn.Conv1d(self.coarse, self.gate * self.coarse, 1 + 2 * context, padding=context)
        yield group_norm(self.norm_groups, self.gate * self.coarse)
        yield nn.GLU(dim=1) if self.gate == 2 else nn.ReLU()


class Demucs(nn.Module):
    """Demucs v1 and v2. The arguments are those of the training that made a checkpoint.

    `dconv_init` and `rescale` only shape fresh weights.
    """

    def __init__(
        self,
        sources: Sequence[str],
        audio_channels: int = 2,
        channels: int = 64,
        growth: float = 2.0,
        depth: int = 6,
        rewrite: bool = True,
        lstm_layers: int = 0,
        kernel_size: int = 8,
        stride: int = 4,
        context: int = 1,
        gelu: bool = True,
        glu: bool = True,
        norm_starts: int = 4,
        norm_groups: int = 4,
        dconv_mode: int = 1,
        dconv_depth: int = 2,
        dconv_comp: float = 4,
        dconv_attn: int = 4,
        dconv_lstm: int = 4,
        dconv_init: float = 1e-4,
        normalize: bool = True,
        resample: bool = True,
        rescale: float = 0.1,
        samplerate: int = 44100,
        segment: float | Fraction = 4 * 10,
    ) -> None:
        super().__init__()
        del rescale
        self.sources = list(sources)
        self.audio_channels = audio_channels
        self.samplerate = samplerate
        self.segment = segment
        self.kernel_size = kernel_size
        self.stride = stride
        self.depth = depth
        self.normalize = normalize
        self.resample = resample

        levels: list[_WaveLevel] = []
        fine, coarse = audio_channels, channels
        for index in range(depth):
            dconv = DConvConfig(
                depth=dconv_depth,
                compress=dconv_comp,
                init=dconv_init,
                lstm=index >= dconv_lstm,
                attn=index >= dconv_attn,
            )
            levels.append(
                _WaveLevel(
                    fine=fine,
                    coarse=coarse,
                    kernel_size=kernel_size,
                    stride=stride,
                    norm_groups=norm_groups if index >= norm_starts else None,
                    gelu=gelu,
                    gate=(2 if glu else 1) if rewrite else None,
                    context=context,
                    dconv_encoder=dconv if dconv_mode & 1 else None,
                    dconv_decoder=dconv if dconv_mode & 2 else None,
                )
            )
            fine, coarse = coarse, int(growth * coarse)
        self.encoder = nn.ModuleList(level.encoder() for level in levels)
        self.decoder = nn.ModuleList(
            level.decoder(level.fine if index else len(self.sources) * audio_channels, not index)
            for index, level in reversed(list(enumerate(levels)))
        )
        self.lstm = BLSTM(fine, lstm_layers) if lstm_layers else None

    def valid_length(self, length: int) -> int:
        """The next length of a window that leaves no sample over in any convolution."""
        if self.resample:
            length *= 2
        for _ in range(self.depth):
            length = max(1, math.ceil((length - self.kernel_size) / self.stride) + 1)
        for _ in range(self.depth):
            length = (length - 1) * self.stride + self.kernel_size
        return math.ceil(length / 2) if self.resample else length

    def forward(self, mix: Tensor) -> Tensor:
        """(B C W) -> (B S C W)."""
        if not self.normalize:
            return self._separate(mix)
        mono = mix.mean(dim=1, keepdim=True)
        mean, std = mono.mean(dim=-1, keepdim=True), mono.std(dim=-1, keepdim=True)
        y = self._separate((mix - mean) / (1e-5 + std))
        return y * std[:, None] + mean[:, None]

    def _separate(self, x: Tensor) -> Tensor:
        length = x.shape[-1]
        missing = self.valid_length(length) - length
        x = F.pad(x, (missing // 2, missing - missing // 2))
        x = self._estimate(resample(x, 1, 2)) if self.resample else self._estimate(x)
        if self.resample:
            x = resample(x, 2, 1)
        y: Tensor = _centre(x, length).unflatten(1, (-1, self.audio_channels))
        return y

    def _estimate(self, x: Tensor) -> Tensor:
        """The U-Net: (B C W) -> (B S*C W')."""
        skips = []
        for encode in self.encoder:
            x = encode(x)
            skips.append(x)
        if self.lstm is not None:
            x = self.lstm(x)
        for decode in self.decoder:
            x = decode(x + _centre(skips.pop(), x.shape[-1]))
        return x

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As every module does; the first Demucs, which had no norms yet, is understood too."""
        state = dict(state_dict)
        own = self.state_dict().keys()
        for index in range(self.depth):
            for side in ("encoder", "decoder"):
                for kind in ("bias", "weight"):
                    old, new = f"{side}.{index}.2.{kind}", f"{side}.{index}.3.{kind}"
                    if old in state and old not in own:
                        state[new] = state.pop(old)
        return super().load_state_dict(state, strict=strict, assign=assign)
