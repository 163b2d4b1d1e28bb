"""Harmonic and percussive sounds: a small network for demucs-infer."""
