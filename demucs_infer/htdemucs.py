"""Define Hybrid Transformer Demucs (v4): Hybrid Demucs with a transformer at its bottleneck.

Shapes: B batch, S sources, C channels, F bins, T frames, W samples of the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from torch import Tensor, nn
from torch.nn import functional as F

from demucs_infer.hdemucs import Hybrid, HybridConfig
from demucs_infer.system.lazy import make_getattr
from demucs_infer.transformer import CrossTransformer, TransformerConfig
from demucs_infer.utils import capture_init

_UPSTREAM = {
    "CrossTransformerEncoder": "demucs_infer.upstream.transformer",
    "ispectro": "demucs_infer.spec",
    "spectro": "demucs_infer.spec",
    "wiener": "demucs_infer.wiener",
    **dict.fromkeys(
        ("HDecLayer", "HEncLayer", "MultiWrap", "ScaledEmbedding", "pad1d"),
        "demucs_infer.upstream.hdemucs",
    ),
}
__getattr__ = make_getattr(__name__, _UPSTREAM)


class HTDemucs(Hybrid):
    """Demucs v4. The arguments are upstream's, as stored in a checkpoint.

    `emb_smooth`, `dconv_init` and `rescale` only affect newly initialized weights; dropout,
    learning rate, weight decay, random shifts and position augmentation only act in training.
    Sparse attention, which no released checkpoint uses, raises a `ValueError`.
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
        depth: int = 4,
        rewrite: bool = True,
        multi_freqs: Sequence[float] | None = None,
        multi_freqs_depth: int = 3,
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
        dconv_comp: float = 8,
        dconv_init: float = 1e-3,
        bottom_channels: int = 0,
        t_layers: int = 5,
        t_emb: str = "sin",
        t_hidden_scale: float = 4.0,
        t_heads: int = 8,
        t_dropout: float = 0.0,
        t_max_positions: int = 10000,
        t_norm_in: bool = True,
        t_norm_in_group: int = False,
        t_group_norm: int = False,
        t_norm_first: bool = True,
        t_norm_out: int = True,
        t_max_period: float = 10000.0,
        t_weight_decay: float = 0.0,
        t_lr: float | None = None,
        t_layer_scale: bool = True,
        t_gelu: bool = True,
        t_weight_pos_embed: float = 1.0,
        t_sin_random_shift: int = 0,
        t_cape_mean_normalize: bool = True,
        t_cape_augment: bool = True,
        t_cape_glob_loc_scale: Sequence[float] = (5000.0, 1.0, 1.4),
        t_sparse_self_attn: bool = False,
        t_sparse_cross_attn: bool = False,
        t_mask_type: str = "diag",
        t_mask_random_seed: int = 42,
        t_sparse_attn_window: int = 500,
        t_global_window: int = 100,
        t_sparsity: float = 0.95,
        t_auto_sparsity: bool = False,
        t_cross_first: bool = False,
        rescale: float = 0.1,
        samplerate: int = 44100,
        segment: float | Fraction = 10,
        use_train_segment: bool = True,
    ) -> None:
        arguments = locals()
        if t_layers and (t_sparse_self_attn or t_sparse_cross_attn):
            raise ValueError(
                "sparse attention (t_sparse_self_attn, t_sparse_cross_attn) is not supported, and "
                "dense attention would give another result: use a model without it."
            )
        super().__init__(HybridConfig.from_arguments(arguments))
        self.use_train_segment = use_train_segment
        self.bottom_channels = bottom_channels
        width = int(channels * growth ** (depth - 1))
        if bottom_channels:
            self.channel_upsampler = nn.Conv1d(width, bottom_channels, 1)
            self.channel_downsampler = nn.Conv1d(bottom_channels, width, 1)
            self.channel_upsampler_t = nn.Conv1d(width, bottom_channels, 1)
            self.channel_downsampler_t = nn.Conv1d(bottom_channels, width, 1)
        self.crosstransformer: CrossTransformer | None = None
        if t_layers > 0:
            config = TransformerConfig.from_arguments(bottom_channels or width, arguments)
            self.crosstransformer = CrossTransformer(config)

    def valid_length(self, length: int) -> int:
        """Return the length to pad a window to; raise `ValueError` if `length` is too long."""
        if not self.use_train_segment:
            return length
        training_length = int(self.segment * self.samplerate)
        if length > training_length:
            raise ValueError(
                f"the window has {length} samples, but this network was trained on "
                f"{training_length}: use a shorter segment."
            )
        return training_length

    def forward_stems(self, mix: Tensor, stems: Sequence[int]) -> Tensor:
        """Run `forward` and return only `stems`: (B, C, W) -> (B, S, C, W)."""
        length = mix.shape[-1]
        missing = self.valid_length(length) - length
        if not missing:
            return super().forward_stems(mix, stems)
        return super().forward_stems(F.pad(mix, (0, missing)), stems)[..., :length]

    def bottleneck(self, x: Tensor, xt: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Apply the transformer."""
        if self.crosstransformer is None or xt is None:
            return x, xt
        if not self.bottom_channels:
            x, xt = self.crosstransformer(x, xt)
            return x, xt
        bins = x.shape[2]
        x = self.channel_upsampler(x.flatten(2)).unflatten(2, (bins, -1))
        x, xt = self.crosstransformer(x, self.channel_upsampler_t(xt))
        x = self.channel_downsampler(x.flatten(2)).unflatten(2, (bins, -1))
        return x, self.channel_downsampler_t(xt)
