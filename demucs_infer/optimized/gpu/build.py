"""Build a copy of a network that is optimized for a GPU; the original is not changed."""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from demucs_infer.demucs import Demucs
from demucs_infer.hdemucs import Hybrid
from demucs_infer.layers import BLSTM, DecoderLayer, EncoderLayer
from demucs_infer.optimized import unet
from demucs_infer.optimized.gpu import spectra, transformer
from demucs_infer.optimized.gpu.arithmetic import Precision, exact_sums
from demucs_infer.optimized.gpu.graphs import GraphedCore, Graphs
from demucs_infer.optimized.gpu.layers import (
    GpuDecoder,
    GpuEncoder,
    GpuPointwise,
    GpuWaveDecoder,
    GpuWaveEncoder,
)
from demucs_infer.optimized.gpu.spectra import DeviceSpectra
from demucs_infer.optimized.gpu.transformer import GpuTransformer
from demucs_infer.transformer import CrossTransformer

_LAYER_LISTS = ("encoder", "tencoder", "decoder", "tdecoder")


def optimize_for_gpu(
    network: Hybrid | Demucs,
    precision: Precision,
    device: torch.device,
    *,
    graphs: Graphs | None = None,
    complex_numbers: bool = True,
) -> nn.Module:
    """Return a copy of `network` that is optimized for the GPU `device`, where its weights are.

    Spectra are computed on the device, and the core runs as a graph if `graphs` can capture it.
    """
    fast = build_gpu_network(network, precision)
    if isinstance(fast, Hybrid):
        if spectra.supports(fast):
            DeviceSpectra(fast, device, complex_numbers=complex_numbers).install(fast)
        _wrap(fast, "estimate", graphs)
    else:
        _wrap(fast, "_apply_unet", graphs)
    return fast


def _wrap(network: nn.Module, name: str, graphs: Graphs | None) -> None:
    """Make the method `name` of `network` sum in float32, and run as a graph, given `graphs`."""
    original = getattr(network, name)

    def run(*tensors: Any) -> Any:
        with exact_sums():
            return original(*tensors)

    core = run if graphs is None else GraphedCore(run, graphs)
    object.__setattr__(network, name, core)
    if isinstance(core, GraphedCore):
        object.__setattr__(network, "release_memory", core.release)


def build_gpu_network(network: Hybrid | Demucs, precision: Precision) -> nn.Module:
    """Return a copy of `network` whose layers multiply and store in `precision`.

    Layers that only older networks have (LSTM, local attention, norms in the U-Net) stay as they
    are, in float32.
    """
    fast = copy.copy(network)
    fast._modules = dict(network._modules)
    for name, module in network.named_children():
        if name in _LAYER_LISTS:
            layers = list(cast(nn.ModuleList, module))
            fast_layers = [
                _replace_layer(layer, precision, outer=index == 0)
                for index, layer in enumerate(layers)
            ]
            setattr(fast, name, nn.ModuleList(fast_layers))
        elif isinstance(module, nn.Conv1d):
            setattr(fast, name, GpuPointwise(module, precision))
        elif isinstance(module, CrossTransformer) and transformer.supports(module):
            setattr(fast, name, GpuTransformer(module, precision))
        elif isinstance(module, CrossTransformer | BLSTM):
            setattr(fast, name, SingleLayer(module))
    if isinstance(fast, Hybrid):
        _fold_embedding(fast)
    return fast.eval()


def _replace_layer(layer: nn.Module, precision: Precision, *, outer: bool) -> nn.Module:
    if isinstance(layer, EncoderLayer) and unet.supports(layer):
        return GpuEncoder(layer, precision, outer=outer)
    if isinstance(layer, DecoderLayer) and unet.supports(layer):
        return GpuDecoder(layer, precision)
    if isinstance(layer, nn.Sequential) and unet.supports_waveform(layer):
        if any(isinstance(module, nn.ConvTranspose1d) for module in layer):
            return GpuWaveDecoder(layer, precision)
        return GpuWaveEncoder(layer, precision, outer=outer)
    return SingleLayer(layer)


class SingleLayer(nn.Module):
    """A layer that is not optimized, but runs in float32."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.empty = getattr(layer, "empty", False)

    def forward(self, *inputs: Any) -> Any:
        """Run the layer on inputs converted to float32."""
        return self.layer(*(x.float() if isinstance(x, Tensor) else x for x in inputs))


def _fold_embedding(fast: Hybrid) -> None:
    """Let the outermost encoder add the frequency embedding, which is constant, to its output."""
    first = fast.encoder[0]
    if fast.freq_emb is None or not isinstance(first, GpuEncoder):
        return
    bins = fast.freq_emb.embedding.num_embeddings
    offsets = (fast.config.freq_emb * fast.freq_emb(bins)).t()
    first.down.offset = offsets.detach()
    fast.freq_emb = None
