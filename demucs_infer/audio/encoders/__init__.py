"""Encode audio with LAME (MP3), libsndfile (Vorbis), or FFmpeg through PyAV (other formats)."""
