"""Run cells in a kernel of Jupyter, and look at what a notebook would show."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

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
_WIDGET = "application/vnd.jupyter.widget-view+json"
_IMPORT = """
import torch
from demucs_infer import Separator
from demucs_infer.checkpoints.download import progress_bar
"""
_SEPARATE = """
separator = Separator("tiny", device="cpu", progress=True)
output = separator.run(torch.zeros(2, 44100).uniform_(-0.1, 0.1))
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
def outputs() -> Outputs:
    """Return what each cell shows, as kinds and contents of Jupyter's messages."""
    done = subprocess.run(
        [sys.executable, "-c", _RUN_CELLS],
        input=json.dumps([*_CELLS.values()]),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYDEVD_DISABLE_FILE_VALIDATION": "1"},
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(_CELLS, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("cell", ["separate", "download"])
def test_notebook_with_widgets_shows_its_own_bar(cell: str, outputs: Outputs) -> None:
    assert [kind for kind, _ in outputs[cell]] == ["display_data"], outputs[cell]
    assert _WIDGET in outputs[cell][0][1]["data"]


def test_notebook_shows_players(outputs: Outputs) -> None:
    ((kind, content),) = outputs["output"]
    assert kind == "execute_result"
    assert content["data"]["text/html"].count("<audio controls") == 4
    assert content["data"]["text/plain"].startswith("InferenceOutput(drums, bass, other, vocals")


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
