"""Separate a track with networks: plan, run and blend windows; tensors in, tensors out."""
