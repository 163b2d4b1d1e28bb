"""Write the averaged weights of a training as the bundled file: half precision, upstream's layout.

    python tools/pack_tiny.py run demucs_infer/tiny.safetensors

Prints the two lines for the catalog.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

AT_SEPARATION = {
    "wiener_iters": 1,  # a Wiener filter on top of what was trained; costs half the speed
    "segment": 6.95,  # 300 frames, the length that the filter works on
}
"""Constructor arguments that no weight depends on."""


def pack(run: Path, target: Path) -> None:
    """Write the network of `run/checkpoint.pt` with its constructor arguments as metadata."""
    weights = torch.load(run / "checkpoint.pt", weights_only=True)["averaged"]
    halves = {name: weight.half().contiguous() for name, weight in weights.items()}
    if not all(weight.isfinite().all() for weight in halves.values()):
        raise SystemExit("a weight does not fit half precision")
    kwargs = json.dumps(json.loads((run / "architecture.json").read_text()) | AT_SEPARATION)
    metadata = {"klass": "demucs.hdemucs.HDemucs", "args": "[]", "kwargs": kwargs}
    save_file(halves, target, metadata)


def main() -> None:
    """Parse the arguments, pack, and print the catalog lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of the training")
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    pack(args.run, args.target)
    data = args.target.read_bytes()
    print(f'sha256 = "{hashlib.sha256(data).hexdigest()}"')
    print(f"size = {len(data)}")


if __name__ == "__main__":
    main()
