"""The completion scripts offer commands, flags and values, in the shells themselves."""

import shutil
import subprocess

import pytest

from demucs_infer.cli.completion import make_script
from demucs_infer.cli.main import main
from demucs_infer.cli.parser import COMMANDS


def complete(words: list[str]) -> set[str]:
    """Return what bash offers for the last of the words."""
    script = make_script("bash") + (
        f"COMP_WORDS=({' '.join(repr(word) for word in words)}); COMP_CWORD={len(words) - 1}; "
        "_demucs_infer; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_bash_completes_commands_flags_and_values() -> None:
    assert set(COMMANDS) <= complete(["demucs-infer", ""])
    assert complete(["demucs-infer", "song.mp3", "--two"]) == {"--two-stems"}
    assert complete(["demucs-infer", "song.mp3", "--progress", "j"]) == {"json"}
    assert complete(["demucs-infer", "song.mp3", "--collisions", ""]) == {"auto", "error", "number"}
    assert complete(["demucs-infer", "batch", "x.csv", "--collisions", ""]) == {"error", "digest"}
    assert "--html" in complete(["demucs-infer", "eval", "--h"])


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_accept_their_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "two-stems" in script and "doctor" in script
    if path := shutil.which(shell):
        subprocess.run([path, "-n"], input=script, text=True, check=True)
