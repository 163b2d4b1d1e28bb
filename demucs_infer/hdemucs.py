"""Define Hybrid Demucs (v3): a U-Net on the spectrogram and one on the waveform, summed at the end.

Shapes: B batch, S sources, C channels, P planes, F bins, T frames, W samples of the window. Planes
are what the network sees of a spectrogram: real and imaginary parts, or magnitudes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demucs_infer.demucs import LEFT_OUT as _LEFT_OUT_OF_DEMUCS
from demucs_infer.layers import (
    BandDecoder,
    BandEncoder,
    DConvConfig,
    DecoderLayer,
    EncoderLayer,
    FrequencyEmbedding,
    LayerConfig,
)
from demucs_infer.spec import ispectro, pad_reflect, spectro
from demucs_infer.system.lazy import make_getattr
from demucs_infer.utils import capture_init
from demucs_infer.wiener import wiener

_UPSTREAM = ("HDecLayer", "HEncLayer", "MultiWrap", "ScaledEmbedding", "pad1d")
__getattr__ = make_getattr(
    __name__,
    {
        **dict.fromkeys(_UPSTREAM, "demucs_infer.upstream.hdemucs"),
        "DConv": "demucs_infer.upstream.demucs",
    },
    {"rescale_module": _LEFT_OUT_OF_DEMUCS["rescale_module"]},
)


_ATTRIBUTES = {"freq_emb_scale": "freq_emb"} | {
    name: name
    for name in (
        *("cac", "channels", "context", "depth", "end_iters", "hybrid", "hybrid_old"),
        *("kernel_size", "stride", "wiener_iters", "wiener_residual"),
    )
}
"""Names of attributes of upstream's networks, and of the fields of this module they are in."""


@dataclass(frozen=True, kw_only=True)  # no slots: the compiler needs weak references
class HybridConfig:
    """The arguments of a hybrid network that its layers depend on, under upstream's names."""

    sources: Sequence[str]
    audio_channels: int
    channels: int
    channels_time: int | None
    growth: float
    nfft: int
    wiener_iters: int
    end_iters: int
    wiener_residual: bool
    cac: bool
    depth: int
    rewrite: bool
    hybrid: bool = True
    hybrid_old: bool = False
    multi_freqs: Sequence[float] | None
    multi_freqs_depth: int
    freq_emb: float | None
    emb_scale: float
    kernel_size: int
    time_stride: int
    stride: int
    context: int
    context_enc: int
    norm_starts: int
    norm_groups: int
    dconv_mode: int
    dconv_depth: int
    dconv_comp: float
    dconv_attn: int | None = None
    dconv_lstm: int | None = None
    """First stage whose residual branches have local attention or an LSTM; None: no stage."""
    dconv_init: float
    samplerate: int
    segment: float | Fraction

    def __post_init__(self) -> None:
        if self.hybrid_old and not self.hybrid:
            raise ValueError("hybrid_old=True requires hybrid=True: set both, or neither.")
        if self.hybrid and self.wiener_iters != self.end_iters:
            raise ValueError(
                f"wiener_iters={self.wiener_iters} and end_iters={self.end_iters} differ: a hybrid "
                "network needs equal values."
            )

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> HybridConfig:
        """Select the fields from the arguments (`locals()`) of the `__init__` of a network."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: arguments[name] for name in names & arguments.keys()})

    @property
    def planes(self) -> int:
        """Number of planes of one spectrogram."""
        return self.audio_channels * (2 if self.cac else 1)

    def stages(self) -> Iterator[UNetStage]:
        """Yield the parameters of every stage of the two U-Nets, from the outermost inwards."""
        bins = self.nfft // 2
        width, width_time = self.channels, self.channels_time or self.channels
        outer_channels, outer_channels_time = self.planes, self.audio_channels
        for index in range(self.depth):
            merges_time = 1 < bins <= self.kernel_size
            if merges_time:
                width = width_time = max(width, width_time)
            yield UNetStage(
                freq=self._layer_config(index, bins),
                time=self._layer_config(index, None) if self.hybrid and bins > 1 else None,
                merges_time=merges_time,
                bands=self._bands(index),
                outer_channels=outer_channels,
                outer_channels_time=outer_channels_time,
                inner_channels=width,
                inner_channels_time=width_time,
            )
            outer_channels, outer_channels_time = width, width_time
            width, width_time = int(self.growth * width), int(self.growth * width_time)
            if bins > 1:
                bins = 1 if merges_time else bins // self.stride

    def _layer_config(self, index: int, bins: int | None) -> LayerConfig:
        """Return the parameters of a layer with `bins` input bins; None: in the time branch."""
        over_frequency = bins is not None and bins > 1
        kernel_size, stride, padded = self.kernel_size, self.stride, True
        if bins == 1:
            kernel_size, stride = 2 * self.time_stride, self.time_stride
        elif bins is not None and bins <= self.kernel_size:
            kernel_size, padded = bins, False  # one stride over all remaining bins
        dconv = DConvConfig(
            depth=self.dconv_depth,
            compress=self.dconv_comp,
            init=self.dconv_init,
            lstm=self.dconv_lstm is not None and index >= self.dconv_lstm,
            attn=self.dconv_attn is not None and index >= self.dconv_attn,
        )
        return LayerConfig(
            over_frequency=over_frequency,
            kernel_size=kernel_size,
            stride=stride,
            padded=padded,
            norm_groups=self.norm_groups if index >= self.norm_starts else None,
            rewrite=self.rewrite,
            context_encoder=self.context_enc,
            context_decoder=self.context,
            context_across_bins=True,
            dconv_encoder=dconv if self.dconv_mode & 1 else None,
            dconv_decoder=dconv if self.dconv_mode & 2 else None,
        )

    def _bands(self, index: int) -> tuple[float, ...]:
        if not self.multi_freqs or index >= self.multi_freqs_depth:
            return ()
        if index >= self.norm_starts:
            raise ValueError(
                f"multi_freqs splits layer {index} into bands, but norm_starts={self.norm_starts} "
                "gives it a group norm, which cannot be split: lower multi_freqs_depth."
            )
        return tuple(self.multi_freqs)


@dataclass(frozen=True, kw_only=True)  # no slots: the compiler needs weak references
class UNetStage:
    """One stage of the two U-Nets; its outer side is the one nearer to the audio."""

    freq: LayerConfig
    time: LayerConfig | None
    """None: this stage has no time branch."""
    merges_time: bool
    """Whether the time branch ends here, with a single convolution as encoder and decoder."""
    bands: tuple[float, ...]
    """Where the frequency layers are split into bands, as fractions of the number of bins."""
    outer_channels: int
    outer_channels_time: int
    inner_channels: int
    inner_channels_time: int

    def make_encoder(self) -> EncoderLayer | BandEncoder:
        """Build the encoder layer of the frequency branch."""
        if self.bands:
            self._check_bands()
            return BandEncoder(self.outer_channels, self.inner_channels, self.freq, self.bands)
        return EncoderLayer(self.outer_channels, self.inner_channels, self.freq)

    def make_decoder(self, channels_out: int, last: bool) -> DecoderLayer | BandDecoder:
        """Build the decoder layer of the frequency branch."""
        if self.bands:
            self._check_bands()
            return BandDecoder(self.inner_channels, channels_out, self.freq, self.bands, last=last)
        return DecoderLayer(self.inner_channels, channels_out, self.freq, last=last)

    def _check_bands(self) -> None:
        if not (self.freq.over_frequency and self.freq.padded):
            raise ValueError(
                "multi_freqs splits a layer with too few bins: lower multi_freqs_depth."
            )


@dataclass(frozen=True, slots=True, eq=False)
class Normalizer:
    """The mean and standard deviation of each item of a batch."""

    mean: Tensor
    std: Tensor

    @classmethod
    def measure(cls, x: Tensor) -> Normalizer:
        """Measure the mean and deviation of each item of a batch (B, ...)."""
        axes = tuple(range(1, x.dim()))
        return cls(x.mean(dim=axes, keepdim=True), x.std(dim=axes, keepdim=True))

    def normalize(self, x: Tensor) -> Tensor:
        """Bring (B, ...) to zero mean and unit deviation."""
        return (x - self.mean).div_(1e-5 + self.std)

    def denormalize(self, x: Tensor) -> Tensor:
        """Bring (B, S, ...) back to the original mean and deviation."""
        return (x * self.std[:, None]).add_(self.mean[:, None])


@dataclass(slots=True, eq=False)
class SkipConnections:
    """What the encoders of a branch pass to its decoders, the outermost stage first.

    `tensors` are the outputs of the encoders, `lengths` the lengths in time of their inputs.
    """

    tensors: list[Tensor] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)


def _select_stems(x: Tensor, stems: Sequence[int], size: int) -> Tensor:
    """Select `stems` of `x` (B, S*size, ...); return `x` itself if these are all stems in order."""
    indices, by_stem = list(stems), x.unflatten(1, (-1, size))
    if indices == list(range(by_stem.shape[1])):
        return x
    selected: Tensor = by_stem[:, indices].flatten(1, 2)
    return selected


class Hybrid(nn.Module):
    """A U-Net on the spectrogram and, if `hybrid`, one on the waveform, whose outputs are summed.

    Subclasses define in `bottleneck` what happens between encoders and decoders.
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.config = config
        self.sources = list(config.sources)
        self.audio_channels = config.audio_channels
        self.samplerate = config.samplerate
        self.segment = config.segment
        self.nfft = config.nfft
        self.hop_length = config.nfft // 4
        stages = list(config.stages())
        hybrid_stages = [stage for stage in stages if stage.time is not None]

        self.encoder = nn.ModuleList(stage.make_encoder() for stage in stages)
        self.decoder = nn.ModuleList(
            stage.make_decoder(
                stage.outer_channels if index else config.planes * len(self.sources),
                last=not index,
            )
            for index, stage in reversed(list(enumerate(stages)))
        )
        self.tencoder = nn.ModuleList(
            EncoderLayer(
                stage.outer_channels_time,
                stage.inner_channels_time,
                stage.time,
                empty=stage.merges_time,
            )
            for stage in hybrid_stages
            if stage.time is not None
        )
        self.tdecoder = nn.ModuleList(
            DecoderLayer(
                stage.inner_channels_time,
                stage.outer_channels_time if index else config.audio_channels * len(self.sources),
                stage.time,
                empty=stage.merges_time,
                last=not index,
            )
            for index, stage in reversed(list(enumerate(hybrid_stages)))
            if stage.time is not None
        )
        self.freq_emb: FrequencyEmbedding | None = None
        if config.freq_emb:
            first = stages[0]
            bins = 1 if first.merges_time else config.nfft // 2 // config.stride
            self.freq_emb = FrequencyEmbedding(bins, first.inner_channels, config.emb_scale)

    def bottleneck(self, x: Tensor, xt: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the inputs of the two decoders, given the outputs of the two encoders."""
        raise NotImplementedError

    def forward(self, mix: Tensor) -> Tensor:
        """Separate windows: (B, C, W) -> (B, S, C, W)."""
        return self.forward_stems(mix, range(len(self.sources)))

    def forward_stems(self, mix: Tensor, stems: Sequence[int]) -> Tensor:
        """Run `forward` and return only `stems`; the others are not turned into samples."""
        length = mix.shape[-1]
        z = self.analyze(mix)
        x = self.to_planes(z).to(mix.device)
        if self.config.cac:
            z = z.new_empty(0)
        normalizer, normalizer_time = Normalizer.measure(x), Normalizer.measure(mix)
        # At its peak, a window should not also hold its spectrum in three forms: without a name
        # here, the planes are freed after the first layer; `z` only tells the device, if `cac`.
        planes = [normalizer.normalize(x)]
        del x
        x, xt = self.estimate(
            planes.pop(), normalizer_time.normalize(mix) if self.config.hybrid else None
        )
        if self.config.cac or self.config.wiener_iters <= 0:
            wave = self.to_wave(_select_stems(x, stems, self.config.planes), normalizer, z, length)
        else:  # a Wiener filter needs every source
            wave = self.to_wave(x, normalizer, z, length)[:, list(stems)]
        wave = wave.to(mix.device)
        if xt is None:
            return wave
        xt = _select_stems(xt, stems, self.audio_channels)
        return normalizer_time.denormalize(xt.unflatten(1, (-1, self.audio_channels))).add_(wave)

    def estimate(self, x: Tensor, xt: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Apply the two U-Nets: (B, P, F, T) and (B, C, W) -> (B, S*P, F, T) and (B, S*C, W)."""
        skips, skips_time = SkipConnections(), SkipConnections()
        for index, encode in enumerate(self.encoder):
            skips.lengths.append(x.shape[-1])
            inject = None
            if xt is not None and index < len(self.tencoder):
                encode_time = self.tencoder[index]
                skips_time.lengths.append(xt.shape[-1])
                xt = encode_time(xt)
                if encode_time.empty:
                    inject = xt
                else:
                    skips_time.tensors.append(xt)
            x = encode(x, inject)
            if index == 0 and self.freq_emb is not None:
                # The embedding tells convolutions over frequency which bin they are at.
                x = x + (self.config.freq_emb * self.freq_emb(x.shape[2]))[..., None]
            skips.tensors.append(x)
        x, xt = self.bottleneck(x, xt)
        first_time = len(self.decoder) - len(self.tdecoder)
        for index, decode in enumerate(self.decoder):
            decode_time = self.tdecoder[index - first_time] if index >= first_time else None
            # First the branch that needs less memory, and frees its skip connection.
            if decode_time is not None and not decode_time.empty:
                xt, _ = decode_time(xt, skips_time.tensors.pop(), skips_time.lengths.pop())
            x, merged = decode(x, skips.tensors.pop(), skips.lengths.pop())
            if decode_time is not None and decode_time.empty:
                xt, _ = decode_time(merged[:, :, 0], None, skips_time.lengths.pop())
        return x, xt

    def analyze(self, mix: Tensor) -> Tensor:
        """Return the spectrum: (B, C, W) -> (B, C, F, T) complex, without the Nyquist bin."""
        if not self.config.hybrid:
            # The last window of a track may be shorter than the reflect padding needs.
            missing = max(0, self.nfft // 2 + 1 - mix.shape[-1])
            return spectro(F.pad(mix, (0, missing)), self.nfft, self.hop_length)[..., :-1, :]
        # A frame per hop, the first one centered on half a hop, to align with the time branch.
        frames = math.ceil(mix.shape[-1] / self.hop_length)
        left = self.margin
        right = left + frames * self.hop_length - mix.shape[-1]
        pad = F.pad(mix, (left, right)) if self.config.hybrid_old else pad_reflect(mix, left, right)
        return spectro(pad, self.nfft, self.hop_length)[..., :-1, 2 : 2 + frames]

    def to_wave(self, x: Tensor, normalizer: Normalizer, z: Tensor, length: int) -> Tensor:
        """Turn planes (B, S*P, F, T) into samples (B, S, C, length); `z` is the mix's spectrum."""
        x = normalizer.denormalize(x.unflatten(1, (-1, self.config.planes)))
        return self.synthesize(self.to_spectra(x.to(z.device), z), length)

    def synthesize(self, z: Tensor, length: int) -> Tensor:
        """Invert `analyze`: (B, S, C, F, T) complex -> (B, S, C, length)."""
        if not self.config.hybrid:
            return ispectro(F.pad(z, (0, 0, 0, 1)), self.hop_length, length)
        z = F.pad(z, (2, 2, 0, 1))  # the frames and the bin that `analyze` left out are silent
        whole = self.hop_length * math.ceil(length / self.hop_length)
        if self.config.hybrid_old:  # delayed by the margin, as these networks were trained
            return ispectro(z, self.hop_length, whole)[..., :length]
        wave = ispectro(z, self.hop_length, whole + 2 * self.margin)
        return wave[..., self.margin : self.margin + length]

    @property
    def margin(self) -> int:
        """Number of samples on each side of a window that its spectrum also depends on."""
        return self.hop_length // 2 * 3

    def to_planes(self, z: Tensor) -> Tensor:
        """Turn a spectrum into the planes of the network: (B, C, F, T) complex -> (B, P, F, T)."""
        if not self.config.cac:
            return z.abs()
        return torch.view_as_real(z).permute(0, 1, 4, 2, 3).flatten(1, 2)

    def to_spectra(self, x: Tensor, z: Tensor) -> Tensor:
        """Turn planes (B, S, P, F, T) into spectra (B, S, C, F, T); `z` is the mix's spectrum."""
        if self.config.cac:
            x = x.unflatten(2, (-1, 2)).permute(0, 1, 2, 4, 5, 3)
            return torch.view_as_complex(x.contiguous())
        if self.config.wiener_iters < 0:
            z = z[:, None]
            return z / (1e-8 + z.abs()) * x
        return wiener(x, z, self.config.wiener_iters, self.config.wiener_residual)

    # Upstream's names, which code around a network uses: exporters, mostly.

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Return an argument that upstream keeps as an attribute, such as `cac` or `depth`."""
            if name in _ATTRIBUTES:
                return getattr(self.config, _ATTRIBUTES[name])
            return super().__getattr__(name)

    def _spec(self, x: Tensor) -> Tensor:
        return self.analyze(x)

    def _magnitude(self, z: Tensor) -> Tensor:
        return self.to_planes(z)

    def _mask(self, z: Tensor, m: Tensor) -> Tensor:
        return self.to_spectra(m, z)

    def _ispec(self, z: Tensor, length: int) -> Tensor:
        return self.synthesize(z, length)


class HDemucs(Hybrid):
    """Demucs v3. The arguments are upstream's, as stored in a checkpoint.

    `emb_smooth`, `dconv_init` and `rescale` only affect newly initialized weights.
    """

    @capture_init
    def __init__(
        self,
        sources: Sequence[str],
        audio_channels: int = 2,
        channels: int = 48,
        channels_time: int | None = None,
        growth: float = 2,
        nfft: int = 4096,
        wiener_iters: int = 0,
        end_iters: int = 0,
        wiener_residual: bool = False,
        cac: bool = True,
        depth: int = 6,
        rewrite: bool = True,
        hybrid: bool = True,
        hybrid_old: bool = False,
        multi_freqs: Sequence[float] | None = None,
        multi_freqs_depth: int = 2,
        freq_emb: float | None = 0.2,
        emb_scale: float = 10,
        emb_smooth: bool = True,
        kernel_size: int = 8,
        time_stride: int = 2,
        stride: int = 4,
        context: int = 1,
        context_enc: int = 0,
        norm_starts: int = 4,
        norm_groups: int = 4,
        dconv_mode: int = 1,
        dconv_depth: int = 2,
        dconv_comp: float = 4,
        dconv_attn: int = 4,
        dconv_lstm: int = 4,
        dconv_init: float = 1e-4,
        rescale: float = 0.1,
        samplerate: int = 44100,
        segment: float | Fraction = 4 * 10,
    ) -> None:
        super().__init__(HybridConfig.from_arguments(locals()))

    def bottleneck(self, x: Tensor, xt: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return zeros: the decoders only get what goes through the skip connections."""
        return torch.zeros_like(x), None if xt is None else torch.zeros_like(xt)
