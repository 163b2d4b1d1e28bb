"""Read untrusted checkpoint files as data, and download and cache them."""
