"""Merge the published files, one per stem: `join OUT vocals=FILE drums=FILE`."""

import sys
from collections.abc import Mapping, Sequence

import torch
from safetensors.torch import save_file

IGNORED_TENSORS = {"sample_rate", "stft.window", "transform.0.window"}
"""Additional tensors of some files that the network does not use."""


def join(out: str, files: Mapping[str, str]) -> int:
    """Write all weights under `targets.STEM.` and return their number."""
    joined = {}
    for stem, path in files.items():
        state = torch.load(path, map_location="cpu", weights_only=True)
        joined |= {
            f"targets.{stem}.{name}": weight.contiguous()
            for name, weight in state.items()
            if name not in IGNORED_TENSORS
        }
    save_file(joined, out)
    return len(joined)


def main(arguments: Sequence[str]) -> None:
    """Merge the files of a command line."""
    out, *pairs = arguments
    files = dict(pair.split("=", 1) for pair in pairs)
    print(f"{out}: {join(out, files)} weights of {', '.join(files)}")


if __name__ == "__main__":
    main(sys.argv[1:])
