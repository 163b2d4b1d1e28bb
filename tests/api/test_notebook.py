"""Run cells in a kernel of Jupyter, and look at what a notebook would show."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import soundfile

from tests.helpers.audio_signals import make_noise
from tests.helpers.cli_process import ROOT

pytestmark = pytest.mark.skipif(
    not (find_spec("ipykernel") and find_spec("ipywidgets")),
    reason="ipykernel or ipywidgets is not installed",
)

# The kernel runs in the process of its client: no ports are needed.
_RUN_CELLS = """
import json, sys
from ipykernel.inprocess.manager import InProcessKernelManager

manager = InProcessKernelManager()
manager.start_kernel()
client = manager.client()
client.start_channels()
outputs = []
for cell in json.load(sys.stdin):
    client.execute(cell)
    messages = []
    while client.iopub_channel.msg_ready():
        message = client.get_iopub_msg()
        if message["msg_type"] in ("stream", "display_data", "execute_result", "error"):
            messages.append([message["msg_type"], message["content"]])
    outputs.append(messages)
print(json.dumps(outputs), file=sys.__stdout__)
"""
_PAGE = ROOT / "docs/howto/notebook.md"
_WIDGET = "application/vnd.jupyter.widget-view+json"
_IMPORT = """
import torch
from demucs_infer import Separator
from demucs_infer.checkpoints.download import progress_bar
"""
_SEPARATE = """
separator = Separator("tiny", device="cpu", progress=True)
output = separator.run(torch.zeros(2, 88200).uniform_(-0.1, 0.1))
"""
_SHOW_BARS = """
import ipywidgets, json
states = [item["state"] for item in ipywidgets.Widget.get_manager_state()["state"].values()]
bars = [state for state in states if state["_model_name"] == "FloatProgressModel"]
print(json.dumps([[bar["value"], bar["max"], bar["bar_style"]] for bar in bars]))
"""
_SEPARATE_AGAIN = "output = separator.run(output.mixture)"
_DOWNLOAD = """
with progress_bar("model") as report:
    report(1, 4)
    report(4, 4)
"""


_REPLACE = """
import tqdm
class Quiet(tqdm.tqdm):
    def display(self, *args, **kwargs):
        pass
tqdm.tqdm = Quiet
"""
_HIDE = """
import sys
widgets, sys.modules["ipywidgets"] = sys.modules["ipywidgets"], None
"""
_CELLS = {
    "import": _IMPORT,
    "separate": _SEPARATE,
    "bars": _SHOW_BARS,
    "output": "output",
    "download": _DOWNLOAD,
    "hide widgets": _HIDE,
    "separate without widgets": _SEPARATE_AGAIN,
    "show widgets": f"sys.modules['ipywidgets'] = widgets\n{_REPLACE}",
    "separate with a replaced class": _SEPARATE_AGAIN,
    "download with a replaced class": _DOWNLOAD,
}
Outputs = dict[str, list[tuple[str, dict[str, Any]]]]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Outputs:
    """Return what each cell shows, as kinds and contents of Jupyter's messages."""
    folder = tmp_path_factory.mktemp("notebook")
    soundfile.write(folder / "song.mp3", make_noise(2, 44100).T.numpy(), 44100)
    names = {"htdemucs": "tiny", "song.mp3": folder / "song.mp3", "stems.svg": folder / "stems.svg"}
    cells = {}
    for index, cell in enumerate(re.findall(r"```python\n(.*?)```", _PAGE.read_text(), re.DOTALL)):
        for name, replacement in names.items():
            cell = cell.replace(f'"{name}"', f'"{replacement}"')
        cells[f"page {index}"] = cell
    picture = f"import IPython.display; IPython.display.SVG({str(names['stems.svg'])!r})"
    cells |= {**_CELLS, "picture of the page": picture}
    done = subprocess.run(
        [sys.executable, "-c", _RUN_CELLS],
        input=json.dumps([*cells.values()]),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYDEVD_DISABLE_FILE_VALIDATION": "1"},
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(cells, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("cell", ["separate", "download"])
def test_notebook_with_widgets_shows_its_own_bar(cell: str, outputs: Outputs) -> None:
    assert [kind for kind, _ in outputs[cell]] == ["display_data"], outputs[cell]
    assert _WIDGET in outputs[cell][0][1]["data"]


def test_bar_of_a_notebook_ends_at_its_total(outputs: Outputs) -> None:
    ((_, content),) = outputs["bars"]
    assert json.loads(content["text"]) == [[1.0, 1.0, "success"], [2.0, 2.0, "success"]]


@pytest.mark.parametrize(
    ("cell", "kinds"),
    [
        pytest.param("page 0", ["execute_result"], id="players"),
        pytest.param("page 1", ["stream"], id="events"),
        pytest.param("page 2", ["display_data"], id="bar"),
        pytest.param("page 3", [], id="picture"),
    ],
)
def test_cell_of_the_page_shows_what_it_is_for(
    cell: str, kinds: list[str], outputs: Outputs
) -> None:
    assert sorted({kind for kind, _ in outputs[cell]}) == kinds, outputs[cell]


@pytest.mark.parametrize("cell", ["page 0", "output"])
def test_notebook_shows_players(cell: str, outputs: Outputs) -> None:
    ((kind, content),) = outputs[cell]
    assert kind == "execute_result"
    assert content["data"]["text/html"].count("<audio controls") == 4
    assert content["data"]["text/plain"].startswith("InferenceOutput(drums, bass, other, vocals")


def test_picture_of_the_page_has_the_stems(outputs: Outputs) -> None:
    ((kind, content),) = outputs["picture of the page"]
    assert kind == "execute_result"
    assert all(stem in content["data"]["image/svg+xml"] for stem in ("drums", "vocals"))


def test_notebook_without_widgets_shows_text_without_a_warning(outputs: Outputs) -> None:
    messages = outputs["separate without widgets"]
    text = "".join(content["text"] for _, content in messages)
    assert {kind for kind, _ in messages} == {"stream"}
    assert "100%" in text and "seconds/s" in text and "arning" not in text


@pytest.mark.parametrize("task", ["separate", "download"])
def test_class_that_a_program_puts_into_tqdm_is_used(task: str, outputs: Outputs) -> None:
    assert outputs["show widgets"] == []
    messages = outputs[f"{task} with a replaced class"]
    assert not "".join(content.get("text", "?") for _, content in messages).strip()
