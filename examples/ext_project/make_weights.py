"""Write the weights: `python make_weights.py weights.safetensors [taps]`."""

import sys

from hpss_example.ready import weights
from safetensors.torch import save_file

if __name__ == "__main__":
    path, *taps = sys.argv[1:]
    save_file(weights(int(taps[0]) if taps else 17), path)
    print(f"wrote {path}")
