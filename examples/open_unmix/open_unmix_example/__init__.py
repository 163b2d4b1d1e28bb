"""Open-Unmix for demucs-infer."""
