"""Hybrid Demucs (v3): one U-Net on the spectrogram, one on the waveform, summed at the end.

Shapes: B batch, S sources, C channels, F bins, T frames, W samples of the window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
from demucs_infer.wiener import wiener


@dataclass(frozen=True, slots=True, kw_only=True)
class HybridConfig:
    """The arguments that decide the shape of a hybrid, under the names that trainings gave them."""

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
    """First level whose residual branches have local attention, an LSTM; None: none has."""
    dconv_init: float
    samplerate: int
    segment: float | Fraction

    def __post_init__(self) -> None:
        if self.hybrid_old and not self.hybrid:
            raise ValueError("hybrid_old=True describes a padding of hybrids: set hybrid=True.")
        if self.hybrid and self.wiener_iters != self.end_iters:
            raise ValueError(
                f"a hybrid needs wiener_iters == end_iters, not {self.wiener_iters} and "
                f"{self.end_iters}: its waveform branch was trained beside one of them."
            )

    @property
    def planes(self) -> int:
        """Channels of one spectrogram as the network sees it: real and imaginary ones apart."""
        return self.audio_channels * (2 if self.cac else 1)

    def levels(self) -> Iterator[UNetLevel]:
        """What happens at every level of the two ladders, from the outermost inwards."""
        bins = self.nfft // 2
        width, width_time = self.channels, self.channels_time or self.channels
        fine, fine_time = self.planes, self.audio_channels
        for index in range(self.depth):
            merges = 1 < bins <= self.kernel_size
            if merges:
                width = width_time = max(width, width_time)
            yield UNetLevel(
                freq=self._layer(index, bins),
                time=self._layer(index, None) if self.hybrid and bins > 1 else None,
                merges=merges,
                bands=self._bands(index),
                fine=fine,
                fine_time=fine_time,
                coarse=width,
                coarse_time=width_time,
            )
            fine, fine_time = width, width_time
            width, width_time = int(self.growth * width), int(self.growth * width_time)
            if bins > 1:
                bins = 1 if merges else bins // self.stride

    def _layer(self, index: int, bins: int | None) -> LayerConfig:
        """The layer at a level that still has `bins` of them; None: in the time branch."""
        over_frequency = bins is not None and bins > 1
        kernel_size, stride, padded = self.kernel_size, self.stride, True
        if bins == 1:
            kernel_size, stride = 2 * self.time_stride, self.time_stride
        elif bins is not None and bins <= self.kernel_size:
            kernel_size, padded = bins, False  # one stride over all that is left
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
                f"multi_freqs splits level {index}, which norm_starts={self.norm_starts} gives a "
                "group norm: a norm cannot be split into bands; lower multi_freqs_depth."
            )
        return tuple(self.multi_freqs)


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetLevel:
    """One level of the two ladders: the fine side is towards the audio, the coarse side deeper."""

    freq: LayerConfig
    time: LayerConfig | None
    """None: there is no time branch at this level."""
    merges: bool
    """The time branch ends here: its layers are one convolution each."""
    bands: tuple[float, ...]
    """Where the layers over frequency are split, as fractions of all bins."""
    fine: int
    fine_time: int
    coarse: int
    coarse_time: int

    def encoder(self) -> EncoderLayer | BandEncoder:
        if self.bands:
            return BandEncoder(self.fine, self.coarse, self._splittable(), self.bands)
        return EncoderLayer(self.fine, self.coarse, self.freq)

    def decoder(self, channels_out: int, last: bool) -> DecoderLayer | BandDecoder:
        if self.bands:
            return BandDecoder(self.coarse, channels_out, self._splittable(), self.bands, last=last)
        return DecoderLayer(self.coarse, channels_out, self.freq, last=last)

    def _splittable(self) -> LayerConfig:
        if not (self.freq.over_frequency and self.freq.padded):
            raise ValueError(
                "multi_freqs splits a level that has too few bins left: lower multi_freqs_depth."
            )
        return self.freq


@dataclass(frozen=True, slots=True, eq=False)
class Scale:
    """The mean and deviation of every item of a batch: what is taken off, and put on again."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Scale:
        axes = tuple(range(1, x.dim()))
        return cls(x.mean(dim=axes, keepdim=True), x.std(dim=axes, keepdim=True))

    def remove(self, x: Tensor) -> Tensor:
        """(B ...) -> (B ...) around zero."""
        return (x - self.mean) / (1e-5 + self.std)

    def restore(self, x: Tensor) -> Tensor:
        """(B S ...) -> (B S ...)."""
        return x * self.std[:, None] + self.mean[:, None]


@dataclass(slots=True, eq=False)
class SkipConnections:
    """What the way up needs from the way down, of one branch; the outermost level first."""

    skips: list[Tensor] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)


def _only(x: Tensor, stems: Sequence[int], size: int) -> Tensor:
    """Those stems of (B S*size ...): a view, unless some are left out."""
    wanted, each = list(stems), x.unflatten(1, (-1, size))
    return x if wanted == list(range(each.shape[1])) else each[:, wanted].flatten(1, 2)


class Hybrid(nn.Module):
    """A spectrogram U-Net and, unless `hybrid` is off, a waveform U-Net that meets it half-way.

    Subclasses say in `bottom` what happens between the two halves.
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
        levels = list(config.levels())
        both = [level for level in levels if level.time is not None]

        self.encoder = nn.ModuleList(level.encoder() for level in levels)
        self.decoder = nn.ModuleList(
            level.decoder(level.fine if index else config.planes * len(self.sources), not index)
            for index, level in reversed(list(enumerate(levels)))
        )
        self.tencoder = nn.ModuleList(
            EncoderLayer(level.fine_time, level.coarse_time, level.time, empty=level.merges)
            for level in both
            if level.time is not None
        )
        self.tdecoder = nn.ModuleList(
            DecoderLayer(
                level.coarse_time,
                level.fine_time if index else config.audio_channels * len(self.sources),
                level.time,
                empty=level.merges,
                last=not index,
            )
            for index, level in reversed(list(enumerate(both)))
            if level.time is not None
        )
        self.freq_emb: FrequencyEmbedding | None = None
        if config.freq_emb:
            first = levels[0]
            bins = 1 if first.merges else config.nfft // 2 // config.stride
            self.freq_emb = FrequencyEmbedding(bins, first.coarse, config.emb_scale)

    def bottom(self, x: Tensor, xt: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the two ways up start with, given what the two ways down ended with."""
        raise NotImplementedError

    def forward(self, mix: Tensor) -> Tensor:
        """(B C W) -> (B S C W)."""
        return self.forward_stems(mix, range(len(self.sources)))

    def forward_stems(self, mix: Tensor, stems: Sequence[int]) -> Tensor:
        """As `forward`, for these stems: what the others would say is not made into samples."""
        length = mix.shape[-1]
        z = self.analyse(mix)
        x = self.to_planes(z).to(mix.device)
        scale, scale_time = Scale.of(x), Scale.of(mix)
        x, xt = self.estimate(
            scale.remove(x), scale_time.remove(mix) if self.config.hybrid else None
        )
        if self.config.cac or self.config.wiener_iters <= 0:
            wave = self.to_wave(_only(x, stems, self.config.planes), scale, z, length)
        else:  # a Wiener filter hears every source for each
            wave = self.to_wave(x, scale, z, length)[:, list(stems)]
        wave = wave.to(mix.device)
        if xt is None:
            return wave
        xt = _only(xt, stems, self.audio_channels)
        return scale_time.restore(xt.unflatten(1, (-1, self.audio_channels))) + wave

    def estimate(self, x: Tensor, xt: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The two U-Nets: (B P F T) and (B C W) -> (B S*P F T) and (B S*C W), P planes."""
        trail, trail_time = SkipConnections(), SkipConnections()
        for index, encode in enumerate(self.encoder):
            trail.lengths.append(x.shape[-1])
            inject = None
            if xt is not None and index < len(self.tencoder):
                encode_time = self.tencoder[index]
                trail_time.lengths.append(xt.shape[-1])
                xt = encode_time(xt)
                if encode_time.empty:
                    inject = xt
                else:
                    trail_time.skips.append(xt)
            x = encode(x, inject)
            if index == 0 and self.freq_emb is not None:
                # Lets convolutions over frequency know where they are.
                x = x + (self.config.freq_emb * self.freq_emb(x.shape[2]))[..., None]
            trail.skips.append(x)
        return self._up(*self.bottom(x, xt), trail, trail_time)

    def _up(
        self, x: Tensor, xt: Tensor | None, trail: SkipConnections, trail_time: SkipConnections
    ) -> tuple[Tensor, Tensor | None]:
        first_time = len(self.decoder) - len(self.tdecoder)
        for index, decode in enumerate(self.decoder):
            x, coarse = decode(x, trail.skips.pop(), trail.lengths.pop())
            if index < first_time:
                continue
            decode_time = self.tdecoder[index - first_time]
            if decode_time.empty:
                xt, _ = decode_time(coarse[:, :, 0], None, trail_time.lengths.pop())
            else:
                xt, _ = decode_time(xt, trail_time.skips.pop(), trail_time.lengths.pop())
        return x, xt

    def analyse(self, mix: Tensor) -> Tensor:
        """The spectrum: (B C W) -> (B C F T) complex, without the bin at half the rate."""
        if not self.config.hybrid:
            # The last window of a track may be shorter than what its ends are mirrored by.
            missing = max(0, self.nfft // 2 + 1 - mix.shape[-1])
            return spectro(F.pad(mix, (0, missing)), self.nfft, self.hop_length)[..., :-1, :]
        # One frame every hop, the first one centred on half a hop: the time branch counts alike.
        frames = math.ceil(mix.shape[-1] / self.hop_length)
        left = self.margin
        right = left + frames * self.hop_length - mix.shape[-1]
        pad = F.pad(mix, (left, right)) if self.config.hybrid_old else pad_reflect(mix, left, right)
        return spectro(pad, self.nfft, self.hop_length)[..., :-1, 2 : 2 + frames]

    def to_wave(self, x: Tensor, scale: Scale, z: Tensor, length: int) -> Tensor:
        """The samples of planes around zero, z of the mix: (B S*P F T) -> (B S C length)."""
        x = scale.restore(x.unflatten(1, (-1, self.config.planes)))
        return self.synthesise(self.to_spectra(x.to(z.device), z), length)

    def synthesise(self, z: Tensor, length: int) -> Tensor:
        """The samples of a spectrum: (B S C F T) complex -> (B S C length)."""
        if not self.config.hybrid:
            return ispectro(F.pad(z, (0, 0, 0, 1)), self.hop_length, length)
        return self.overlap(F.pad(z, (2, 2, 0, 1)), length)

    def overlap(self, z: Tensor, length: int) -> Tensor:
        """The samples of a spectrum that has its last bin and its silent frames again."""
        whole = self.hop_length * math.ceil(length / self.hop_length)
        if self.config.hybrid_old:  # late by the margin, as those networks were trained to be
            return ispectro(z, self.hop_length, whole)[..., :length]
        wave = ispectro(z, self.hop_length, whole + 2 * self.margin)
        return wave[..., self.margin : self.margin + length]

    @property
    def margin(self) -> int:
        return self.hop_length // 2 * 3

    def to_planes(self, z: Tensor) -> Tensor:
        """What the network sees of a spectrum: (B C F T) complex -> (B P F T)."""
        if not self.config.cac:
            return z.abs()
        return torch.view_as_real(z).permute(0, 1, 4, 2, 3).flatten(1, 2)

    def to_spectra(self, x: Tensor, z: Tensor) -> Tensor:
        """The spectra that planes stand for: (B S P F T), of the mix (B C F T) -> (B S C F T)."""
        if self.config.cac:
            x = x.unflatten(2, (-1, 2)).permute(0, 1, 2, 4, 5, 3)
            return torch.view_as_complex(x.contiguous())
        if self.config.wiener_iters < 0:
            z = z[:, None]
            return z / (1e-8 + z.abs()) * x
        return wiener(x, z, self.config.wiener_iters, self.config.wiener_residual)


class HDemucs(Hybrid):
    """Demucs v3. The arguments are those of the training that made a checkpoint.

    `emb_smooth`, `dconv_init` and `rescale` only shape fresh weights.
    """

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
        del emb_smooth, rescale
        super().__init__(
            HybridConfig(
                sources=sources,
                audio_channels=audio_channels,
                channels=channels,
                channels_time=channels_time,
                growth=growth,
                nfft=nfft,
                wiener_iters=wiener_iters,
                end_iters=end_iters,
                wiener_residual=wiener_residual,
                cac=cac,
                depth=depth,
                rewrite=rewrite,
                hybrid=hybrid,
                hybrid_old=hybrid_old,
                multi_freqs=multi_freqs,
                multi_freqs_depth=multi_freqs_depth,
                freq_emb=freq_emb,
                emb_scale=emb_scale,
                kernel_size=kernel_size,
                time_stride=time_stride,
                stride=stride,
                context=context,
                context_enc=context_enc,
                norm_starts=norm_starts,
                norm_groups=norm_groups,
                dconv_mode=dconv_mode,
                dconv_depth=dconv_depth,
                dconv_comp=dconv_comp,
                dconv_attn=dconv_attn,
                dconv_lstm=dconv_lstm,
                dconv_init=dconv_init,
                samplerate=samplerate,
                segment=segment,
            )
        )

    def bottom(self, x: Tensor, xt: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Silence: everything goes through the skip connections."""
        return torch.zeros_like(x), None if xt is None else torch.zeros_like(xt)
