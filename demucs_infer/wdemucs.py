"""The class path that the first hybrid checkpoints name."""

from demucs_infer.hdemucs import HDemucs

WDemucs = HDemucs

__all__ = ["WDemucs"]
