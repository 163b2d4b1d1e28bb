"""A program that calls the command's function, for several tracks."""

import demucs.separate

shared = ["-n", "bag", "--repo", str(REPO), "-d", "cpu", "--shifts", "0", "--float32"]
absent = str(TRACK.with_name("absent.wav"))
facts = demucs.separate.main([*shared, "-o", str(OUT), absent, str(TRACK)])
files = [OUT / "bag" / TRACK.stem / f"{name}.wav" for name in ("bass", "other")]
