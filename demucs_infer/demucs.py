"""Define Demucs v1 and v2 (and the time branch of v3 on its own): a U-Net on the waveform.

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

from demucs_infer import layers
from demucs_infer.layers import BLSTM, DConvConfig, group_norm
from demucs_infer.system.lazy import make_getattr
from demucs_infer.utils import capture_init

_ZERO_CROSSINGS = 24
"""Zero crossings on each side of the resampling filter."""
_ROLLOFF = 0.945
"""Cut-off of the resampling filter, as a fraction of the lower of the two Nyquist frequencies."""


_UPSTREAM = ("DConv", "LocalState")
LEFT_OUT = dict.fromkeys(
    ("rescale_conv", "rescale_module"), "it is only for training, for the weights of a new network"
)
"""Names of upstream's module that this module leaves out, and why."""

__getattr__ = make_getattr(
    __name__,
    {
        **dict.fromkeys(_UPSTREAM, "demucs_infer.upstream.demucs"),
        **dict.fromkeys(("center_trim", "unfold"), "demucs_infer.utils"),
        "LayerScale": "demucs_infer.layers",
    },
    LEFT_OUT,
)


@lru_cache(maxsize=8)
def _sinc_filters(old: int, new: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Build one windowed sinc for each of the `new` output phases: (new, 1, taps)."""
    # A tensor that is cached in inference mode could not be used with autograd later.
    with torch.inference_mode(False):
        rate = min(old, new) * _ROLLOFF
        radius = _filter_radius(old, new)
        taps = torch.arange(-radius, radius + old, device="cpu").float()
        sincs = []
        for phase in range(new):
            t = ((-phase / new + taps / old) * rate).clamp(
                -_ZERO_CROSSINGS, _ZERO_CROSSINGS
            ) * math.pi
            sinc = torch.where(t == 0, torch.ones_like(t), torch.sin(t) / t)
            weights = sinc * torch.cos(t / _ZERO_CROSSINGS / 2) ** 2
            sincs.append(weights / weights.sum())  # unit gain at 0 Hz
        return torch.stack(sincs)[:, None].to(device, dtype)


def _filter_radius(old: int, new: int) -> int:
    """Return how many input samples the filter reads on each side."""
    return math.ceil(_ZERO_CROSSINGS * old / (min(old, new) * _ROLLOFF))


def resample(x: Tensor, old: int, new: int) -> Tensor:
    """Multiply the sample rate by `new / old`, coprime integers: (B, C, W) -> (B, C, W')."""
    batch, channels, length = x.shape
    radius = _filter_radius(old, new)
    x = F.pad(x.reshape(-1, 1, length), (radius, radius + old), mode="replicate")
    y = F.conv1d(x, _sinc_filters(old, new, x.dtype, x.device), stride=old)
    y = y.transpose(1, 2).reshape(batch, channels, -1)
    return y[..., : new * length // old]


def _center_crop(x: Tensor, length: int) -> Tensor:
    """Return the middle `length` steps; if the surplus is odd, the right side loses one more."""
    start = (x.shape[-1] - length) // 2
    return x[..., start : start + length]


@dataclass(frozen=True, slots=True, kw_only=True)
class _WaveStage:
    """The parameters that the encoder and the decoder of one stage of the U-Net share."""

    outer_channels: int
    inner_channels: int
    kernel_size: int
    stride: int
    norm_groups: int | None
    gelu: bool
    gate: int | None
    """Output channels per input channel of the second convolution: 2 before a GLU, 1 before a ReLU.

    None: no second convolution.
    """
    context: int
    dconv_encoder: DConvConfig | None
    dconv_decoder: DConvConfig | None

    def make_encoder(self) -> nn.Sequential:
        """Build the encoder layer."""
        return nn.Sequential(
            nn.Conv1d(self.outer_channels, self.inner_channels, self.kernel_size, self.stride),
            group_norm(self.norm_groups, self.inner_channels),
            self._make_activation(),
            *self._make_dconv(self.dconv_encoder),
            *self._make_rewrite(0),
        )

    def make_decoder(self, channels_out: int, last: bool) -> nn.Sequential:
        """Build the decoder layer; the `last` one has no norm and no activation."""
        up = nn.ConvTranspose1d(self.inner_channels, channels_out, self.kernel_size, self.stride)
        tail = [] if last else [group_norm(self.norm_groups, channels_out), self._make_activation()]
        return nn.Sequential(
            *self._make_rewrite(self.context), *self._make_dconv(self.dconv_decoder), up, *tail
        )

    def _make_activation(self) -> nn.Module:
        return nn.GELU() if self.gelu else nn.ReLU()

    def _make_dconv(self, config: DConvConfig | None) -> Iterator[nn.Module]:
        if config is not None:
            yield layers.DConv(self.inner_channels, config)

    def _make_rewrite(self, context: int) -> Iterator[nn.Module]:
        if self.gate is None:
            return
        channels = self.gate * self.inner_channels
        yield nn.Conv1d(self.inner_channels, channels, 1 + 2 * context, padding=context)
        yield group_norm(self.norm_groups, channels)
        yield nn.GLU(dim=1) if self.gate == 2 else nn.ReLU()


class Demucs(nn.Module):
    """Demucs v1 and v2. The arguments are upstream's, as stored in a checkpoint.

    `dconv_init` and `rescale` only affect newly initialized weights.
    """

    @capture_init
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

        stages: list[_WaveStage] = []
        outer_channels, inner_channels = audio_channels, channels
        for index in range(depth):
            dconv = DConvConfig(
                depth=dconv_depth,
                compress=dconv_comp,
                init=dconv_init,
                lstm=index >= dconv_lstm,
                attn=index >= dconv_attn,
            )
            stages.append(
                _WaveStage(
                    outer_channels=outer_channels,
                    inner_channels=inner_channels,
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
            outer_channels, inner_channels = inner_channels, int(growth * inner_channels)
        self.encoder = nn.ModuleList(stage.make_encoder() for stage in stages)
        self.decoder = nn.ModuleList(
            stage.make_decoder(
                stage.outer_channels if index else len(self.sources) * audio_channels,
                last=not index,
            )
            for index, stage in reversed(list(enumerate(stages)))
        )
        self.lstm = BLSTM(outer_channels, lstm_layers) if lstm_layers else None

    def valid_length(self, length: int) -> int:
        """Return the length, at least `length`, of the shortest window that suits all strides."""
        if self.resample:
            length *= 2
        for _ in range(self.depth):
            length = max(1, math.ceil((length - self.kernel_size) / self.stride) + 1)
        for _ in range(self.depth):
            length = (length - 1) * self.stride + self.kernel_size
        return math.ceil(length / 2) if self.resample else length

    def forward(self, mix: Tensor) -> Tensor:
        """Separate windows: (B, C, W) -> (B, S, C, W)."""
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
        x = self._apply_unet(resample(x, 1, 2)) if self.resample else self._apply_unet(x)
        if self.resample:
            x = resample(x, 2, 1)
        y: Tensor = _center_crop(x, length).unflatten(1, (-1, self.audio_channels))
        return y

    def _apply_unet(self, x: Tensor) -> Tensor:
        """Apply the U-Net: (B, C, W) -> (B, S*C, W')."""
        skips = []
        for encode in self.encoder:
            x = encode(x)
            skips.append(x)
        if self.lstm is not None:
            x = self.lstm(x)
        for decode in self.decoder:
            x = decode(x + _center_crop(skips.pop(), x.shape[-1]))
        return x

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights, also those of the first version of Demucs, whose layers have no norms."""
        state = dict(state_dict)
        expected = self.state_dict().keys()
        for index in range(self.depth):
            for side in ("encoder", "decoder"):
                for kind in ("bias", "weight"):
                    old, new = f"{side}.{index}.2.{kind}", f"{side}.{index}.3.{kind}"
                    if old in state and old not in expected:
                        state[new] = state.pop(old)
        return super().load_state_dict(state, strict=strict, assign=assign)
