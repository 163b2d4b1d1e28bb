"""Check, measure and profile the networks on a GPU, in a few minutes.

    python -m tests.bench.gpu --out FOLDER                  # everything, at most 5 minutes
    python -m tests.bench.gpu --out FOLDER --part check     # only whether it is right
    python -m tests.bench.gpu --out FOLDER --part profile   # only where the time goes
    python -m tests.bench.gpu --out FOLDER --device cpu     # tiny networks: tries the bench itself

Everything is compared with our own float32 form on the CPU. Results appear as they come, and are
written to gpu.json and gpu.md of the folder after each of them. The exit code is 1 if a check fails
or a goal is missed.
"""

import argparse
import platform
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from demucs_infer.devices import choose_device
from demucs_infer.optimized.gpu import kernel_loader
from tests.bench.gpu.checks import check
from tests.bench.gpu.measures import measure
from tests.bench.gpu.profiles import profile_windows
from tests.bench.gpu.report import Part, write_to
from tests.bench.gpu.shapes import RELEASED, SMALL

SECONDS = {"check": 120.0, "measure": 110.0, "profile": 40.0}
"""Time after which a part begins no further step."""


def describe_machine(device: torch.device) -> dict[str, str]:
    """Describe what the figures depend on."""
    machine = {
        "device": str(device),
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda),
        "Python": platform.python_version(),
        "Triton": getattr(sys.modules.get("triton"), "__version__", "none"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["device"] = properties.name
        machine["memory"] = f"{properties.total_memory / 1e9:.0f} GB"
        machine["cuDNN"] = str(torch.backends.cudnn.version())
    return machine


def main() -> int:
    """Run the parts, and return the exit code."""
    parser = argparse.ArgumentParser("python -m tests.bench.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--part", action="append", choices=list(SECONDS), help="default: all")
    parser.add_argument("--seconds", type=float, help="limit of each part, instead of its own")
    args = parser.parse_args()
    device = choose_device(args.device)
    shapes = SMALL if device.type == "cpu" else RELEASED
    warnings.simplefilter("default")
    kernel_loader.load_kernels()
    with (
        write_to(args.out, describe_machine(device)) as report,
        tempfile.TemporaryDirectory() as work,
    ):
        for name in args.part or list(SECONDS):
            part = Part(report, name, args.seconds or SECONDS[name])
            if name == "check":
                check(part, shapes, device, Path(work))
            elif name == "measure":
                measure(part, shapes, device, Path(work))
            else:
                profile_windows(part, shapes, device, args.out)
    for failure in report.failures:
        print(f"FAILED: {failure.part}: {failure.name}: {failure.note}")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
