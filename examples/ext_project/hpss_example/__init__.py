"""What sounds on, and what strikes: a small network for demucs-infer."""
