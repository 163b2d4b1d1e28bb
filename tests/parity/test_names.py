"""The table of names in `docs/migration.md` is what upstream and this package have."""

import re
from importlib import import_module

import pytest

import demucs_infer
from tests.parity import names


def test_table_of_names_is_generated() -> None:
    _, _, rest = names.PAGE.read_text("utf-8").partition(names.BEGIN)
    advice = "`python -m tests.parity.names` rewrites the table"
    assert rest.partition(names.END)[0] == names.make_table(), advice


def test_every_change_that_is_described_is_one() -> None:
    changed = {
        f"{name.module}.{name.name}" for name in names.compare_names() if name.status == "changed"
    }
    assert changed == names.CHANGES.keys()


@pytest.mark.parametrize("module", names.MODULES)
def test_left_out_names_of_a_module_are_upstreams(module: str) -> None:
    left_out = getattr(import_module(f"demucs_infer.{module}"), "LEFT_OUT", {})
    assert left_out.keys() <= {*names.list_public_names(module)}


def test_every_module_of_training_is_left_out_with_a_reason() -> None:
    assert demucs_infer._LEFT_OUT.keys() == names.TRAINING


def test_sed_of_the_page_renames_imports_alone() -> None:
    script = re.search(r"sed -E -i '([^']+)'", names.PAGE.read_text("utf-8"))
    assert script is not None
    import subprocess

    before = (
        "import demucs\nimport demucs.api\nfrom demucs.audio import AudioFile\n"
        "import demucs.separate as s\nx = demucs.api.Separator('htdemucs')\n"
        "run(['python', '-m', 'demucs', '-n', 'mdx'])\nrun('python3 -m demucs.separate a.mp3')\n"
        "# demucs-infer, htdemucs and mydemucs.x stay\nimport demucs_infer\n"
    )
    after = (
        "import demucs_infer\nimport demucs_infer.api\nfrom demucs_infer.audio import AudioFile\n"
        "import demucs_infer.separate as s\nx = demucs_infer.api.Separator('htdemucs')\n"
        "run(['python', '-m', 'demucs_infer', '-n', 'mdx'])\n"
        "run('python3 -m demucs_infer.separate a.mp3')\n"
        "# demucs-infer, htdemucs and mydemucs.x stay\nimport demucs_infer\n"
    )
    done = subprocess.run(
        ["sed", "-E", script[1]], input=before, capture_output=True, text=True, check=True
    )
    assert done.stdout == after


@pytest.mark.parametrize("module", sorted(names.TRAINING))
def test_module_of_training_tells_why_it_is_left_out(module: str) -> None:
    with pytest.raises(ImportError, match=rf"demucs_infer\.{module} is left out: .* demucs|eval"):
        import_module(f"demucs_infer.{module}")


def test_helpers_of_the_first_release_are_importable() -> None:
    from demucs_infer.compat import get_device_tensor, get_torch_arange

    assert get_torch_arange(3, device="cpu").tolist() == [0, 1, 2]
    assert get_device_tensor("cpu").tolist() == [0]
