"""Put the published files, one per stem, into one: `join OUT vocals=FILE drums=FILE`."""

import sys
from collections.abc import Mapping, Sequence

import torch
from safetensors.torch import save_file

NO_WEIGHTS = {"sample_rate", "stft.window", "transform.0.window"}
"""What some files hold besides; nothing is computed with it."""


def join(out: str, files: Mapping[str, str]) -> int:
    """Write all weights under `targets.STEM.`, and say how many there are."""
    joined = {}
    for stem, path in files.items():
        state = torch.load(path, map_location="cpu", weights_only=True)
        joined |= {
            f"targets.{stem}.{name}": weight.contiguous()
            for name, weight in state.items()
            if name not in NO_WEIGHTS
        }
    save_file(joined, out)
    return len(joined)


def main(words: Sequence[str]) -> None:
    out, *pairs = words
    files = dict(pair.split("=", 1) for pair in pairs)
    print(f"{out}: {join(out, files)} weights of {', '.join(files)}")


if __name__ == "__main__":
    main(sys.argv[1:])
