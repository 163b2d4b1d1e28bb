"""Build an optimized copy of a loaded network; the caller's network is left as it was."""

import copy
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from demucs_infer.demucs import Demucs
from demucs_infer.hdemucs import Hybrid
from demucs_infer.layers import DecoderLayer, EncoderLayer
from demucs_infer.optimized import attention, istft, kernels, unet
from demucs_infer.optimized.attention import FastTransformer
from demucs_infer.optimized.autocast import AutocastNetwork
from demucs_infer.optimized.gpu import spectra
from demucs_infer.optimized.gpu.arithmetic import PRECISIONS as GPU_PRECISIONS
from demucs_infer.optimized.gpu.arithmetic import choose_arithmetic
from demucs_infer.optimized.gpu.build import optimize_for_gpu
from demucs_infer.optimized.gpu.graphs import CudaGraphs
from demucs_infer.optimized.istft import InverseStft
from demucs_infer.optimized.packed_linear import (
    find_packable_children,
    pack_linear_layers,
    release_originals,
)
from demucs_infer.optimized.stft import ForwardStft
from demucs_infer.optimized.unet import (
    FastDecoder,
    FastEncoder,
    FastPointwise,
    FastWaveDecoder,
    FastWaveEncoder,
)
from demucs_infer.options import Precision
from demucs_infer.spec import complex_device
from demucs_infer.system.malloc import map_large_allocations, return_free_memory
from demucs_infer.transformer import CrossTransformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("fp32", "bf16", "fp16", "auto")
_LAYER_LISTS = ("encoder", "tencoder", "decoder", "tdecoder")
_RELEASED = "_weights_released"
"""Attribute that is true for a network whose weights `consume_weights` has released."""


def choose_precision(precision: Precision, device: torch.device) -> Precision:
    """Return the precision to use on `device`; raise `ValueError` if it is not supported there.

    On a CPU, "auto" is bf16 only where that is faster; an explicit "bf16" is computed everywhere,
    with a warning where it is slower.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"{precision = } must be one of {', '.join(PRECISIONS)}")
    if device.type != "cpu":
        return "fp16" if precision == "auto" else precision
    if precision == "auto":
        return "bf16" if is_bf16_faster() else "fp32"
    if precision == "fp16":
        raise ValueError("precision='fp16' needs a GPU; on a CPU choose 'bf16' or 'auto'")
    if precision == "bf16" and not is_bf16_faster():
        warnings.warn(
            "precision='bf16' is slower than 'fp32' on this processor, which has no instructions "
            "for it: 'auto' chooses the faster one",
            stacklevel=1,  # one location for all callers, so that it is shown once
        )
    return precision


def explain_precision(precision: Precision, device: torch.device) -> str:
    """Return the precision that `choose_precision` uses, and the reason if that is not obvious."""
    chosen = choose_precision(precision, device)
    if precision != "auto" or device.type != "cpu":
        return chosen
    reason = "has instructions for bf16" if chosen == "bf16" else "would be slower in bf16"
    return f"{chosen} (this processor {reason})"


def is_bf16_faster() -> bool:
    """Return whether the processor can multiply in bf16, and oneDNN has kernels for it.

    Kernels alone do not suffice: without bf16 in the processor, they convert to float32 and back.
    """
    return has_bf16_instructions() and kernels.has_packed_kernels(torch.bfloat16)


def has_bf16_instructions() -> bool:
    """Return whether the processor can multiply in bf16; PyTorch 2.4 does not tell, but Linux."""
    is_supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if is_supported is not None:
        return bool(is_supported())
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False


@map_large_allocations()
def optimize(
    network: Any,
    precision: Precision = "fp32",
    *,
    device: str | torch.device = "cpu",
    consume_weights: bool = False,
    for_compiler: bool = False,
) -> Any:
    """Return an optimized copy of `network`, or `network` itself where there is nothing to gain.

    "fp32" changes only the order of sums. "bf16" and "fp16" compute products and convolutions in
    reduced precision and keep norms, residual streams, softmax and spectra in float32. With
    `for_compiler`, a copy for a GPU only has steps that PyTorch's compiler supports.

    `consume_weights` releases the weights of `network` that the copy has in its own layout, so that
    `network` cannot run any more. It is ignored in reduced precision, where `network` is still
    needed for windows that overflow. Raises `ValueError` for an unusable `precision` and for a
    network whose weights were released.
    """
    if getattr(network, _RELEASED, False):
        raise ValueError("this network's weights were released to an optimized copy: load it again")
    device = torch.device(device)
    precision = choose_precision(precision, device)
    if isinstance(network, Hybrid | Demucs):
        if device.type == "cpu":
            consume_weights = consume_weights and precision == "fp32"
            return _optimize_for_cpu(network, DTYPES[precision], consume_weights=consume_weights)
        is_nvidia = device.type == "cuda" and torch.version.hip is None
        if is_nvidia and precision in GPU_PRECISIONS and not for_compiler:
            has_tf32 = torch.cuda.get_device_capability(device) >= (8, 0)
            arithmetic = choose_arithmetic(precision, has_tf32=has_tf32)
            return optimize_for_gpu(network, arithmetic, device, graphs=CudaGraphs(device))
    if device.type == "cpu" and find_packable_children(network):
        consume_weights = consume_weights and precision == "fp32"
        return _pack_linear_layers(network, DTYPES[precision], consume_weights=consume_weights)
    if isinstance(network, Hybrid) and complex_device(device) != device:
        network = spectra.compute_without_complex(network, device)
    return network if precision == "fp32" else AutocastNetwork(network, DTYPES[precision])


def _pack_linear_layers(
    network: nn.Module, dtype: torch.dtype, *, consume_weights: bool
) -> nn.Module:
    """Return a copy of a custom network whose inner network has packed linear layers."""
    fast = copy.copy(network)
    fast._modules = dict(network._modules)
    inner = cast(nn.Module, network.model)
    fast.model = pack_linear_layers(inner, find_packable_children(network), dtype)
    if consume_weights and release_originals(fast.model):
        setattr(network, _RELEASED, True)
    return fast


def _optimize_for_cpu(
    network: Hybrid | Demucs, dtype: torch.dtype, *, consume_weights: bool
) -> nn.Module:
    fast = copy.copy(network)
    fast._modules = dict(network._modules)
    for name, module in network.named_children():
        if name in _LAYER_LISTS:
            layers = [_optimize_layer(layer, dtype) for layer in cast(nn.ModuleList, module)]
            setattr(fast, name, nn.ModuleList(layers))
        elif isinstance(module, nn.Conv1d):
            setattr(fast, name, FastPointwise(module, dtype))
        elif isinstance(module, CrossTransformer) and attention.supports(module):
            setattr(fast, name, FastTransformer(module, dtype))
    if isinstance(fast, Hybrid):
        _fold_embedding(fast)
        if istft.supports(fast):
            forward = ForwardStft(fast)
            object.__setattr__(fast, "analyze", forward.analyze)
            object.__setattr__(fast, "to_planes", forward.to_planes)
            object.__setattr__(fast, "to_wave", InverseStft(fast))
    if consume_weights:
        for name, module in network.named_children():
            if _release_weights(module, fast._modules[name]):
                setattr(network, _RELEASED, True)
        # The originals leave holes between their norms and biases that windows do not fill.
        return_free_memory()
    return fast.eval()


def _fold_embedding(fast: Hybrid) -> None:
    """Let the outermost encoder add the frequency embedding, which is constant, to its output."""
    first = fast.encoder[0]
    if fast.freq_emb is None or not isinstance(first, FastEncoder) or first.frequency is None:
        return
    bins = fast.freq_emb.embedding.num_embeddings
    offsets = (fast.config.freq_emb * fast.freq_emb(bins)).t()
    first.frequency.offset = offsets.detach()
    fast.freq_emb = None


def _release_weights(module: nn.Module, fast: nn.Module | None) -> bool:
    """Release the matrices of `module` that `fast` has copied; return whether there were any.

    Norms and biases stay: they are small, and `fast` may read them in place.
    """
    if fast is module:
        return False
    if isinstance(module, nn.ModuleList) and isinstance(fast, nn.ModuleList):
        released = [_release_weights(*pair) for pair in zip(module, fast, strict=True)]
        return any(released)
    matrices = [parameter for parameter in module.parameters() if parameter.dim() > 1]
    for parameter in matrices:
        parameter.data = parameter.new_empty(0)
    return bool(matrices)


def _optimize_layer(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    if isinstance(layer, EncoderLayer) and unet.supports(layer):
        return FastEncoder(layer, dtype)
    if isinstance(layer, DecoderLayer) and unet.supports(layer):
        return FastDecoder(layer, dtype)
    if isinstance(layer, nn.Sequential) and unet.supports_waveform(layer):
        is_decoder = any(isinstance(module, nn.ConvTranspose1d) for module in layer)
        return (FastWaveDecoder if is_decoder else FastWaveEncoder)(layer, dtype)
    return layer
