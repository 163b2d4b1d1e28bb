"""Files and codecs: reading, converting and writing sound. Never learns what a stem is."""
