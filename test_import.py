"""The package imports with its core dependencies alone, and importing it costs nothing.

Runs by itself (`python test_import.py`) and under pytest.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent

# What other forks of Demucs need and this package must work without.
FOREIGN = (
    "torchaudio",
    "torchcodec",
    "lameenc",
    "diffq",
    "openunmix",
    "omegaconf",
    "hydra",
    "dora",
)
FOREIGN += ("julius", "demucs", "sphn", "soundfile", "soxr", "huggingface_hub", "einops")
FOREIGN += ("safetensors", "scipy", "museval", "fastapi", "uvicorn", "starlette", "ray", "httpx")

BLOCKED = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FOREIGN!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_no_torch() -> None:
    run("import sys, demucs_infer; assert 'torch' not in sys.modules")


def test_every_room_imports_with_the_core_dependencies_alone() -> None:
    names = "log api audio pretrained separate apply demucs hdemucs htdemucs wdemucs metrics"
    imports = "; ".join(f"import demucs_infer.{name}" for name in names.split())
    names = "from demucs_infer import Separator\nfrom demucs_infer.separate import main"
    run(f"{BLOCKED}\n{imports}\n{names}")


def test_every_public_name_can_be_had() -> None:
    run("import demucs_infer as d\nfor name in d.__all__: getattr(d, name)")


if __name__ == "__main__":
    for name, check in list(globals().items()):
        if name.startswith("test_"):
            check()
            print(f"ok: {name[5:].replace('_', ' ')}")
