"""Keep the class path that the first hybrid checkpoints refer to."""

from demucs_infer.hdemucs import HDemucs

WDemucs = HDemucs

__all__ = ["WDemucs"]
