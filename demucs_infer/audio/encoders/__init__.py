"""Encoders: LAME, libsndfile's Vorbis, and FFmpeg's through PyAV for all other formats."""
