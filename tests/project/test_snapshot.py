"""Compare everything that is public with `tests/snapshot/data`, to the last byte of a stem."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.snapshot import (
    ADVICE,
    DATA,
    commands,
    helps,
    openapi,
    read_json,
    roads,
    signatures,
)

Measured = dict[int, roads.Measured]


@pytest.mark.parametrize("module", signatures.MODULES)
def test_public_names_and_signatures_are_unchanged(module: str) -> None:
    assert signatures.collect_signatures(module) == read_json(signatures.file_of(module)), ADVICE


def test_every_data_file_belongs_to_a_module_or_command() -> None:
    kept = {str(path.relative_to(DATA)) for kind in ("names", "help") for path in
            (DATA / kind).iterdir()}  # fmt: skip
    modules = {signatures.file_of(module) for module in signatures.MODULES}
    assert kept == modules | {f"help/{name}.txt" for name in helps.COMMANDS}


def test_annotations_as_objects_and_as_text_are_equal() -> None:
    """A module may begin or cease to have `from __future__ import annotations`."""

    def objects(a: "dict[str, Path] | None", *, b: "list[roads.Digests]") -> None: ...
    def texts(a: "dict[str, Path] | None", *, b: "list[dict[str, str]]") -> None: ...

    objects.__annotations__ = {"a": dict[str, Path] | None, "b": list[roads.Digests],
                               "return": None}  # fmt: skip
    assert signatures._called(objects) == signatures._called(texts)
    assert signatures._called(texts) == {
        "parameters": ["a: dict[str, Path] | None", "*", "b: list[dict[str, str]]"],
        "returns": "None",
    }


@pytest.mark.parametrize("name", helps.COMMANDS)
def test_help_is_unchanged(name: str) -> None:
    found = helps.describe(*helps.ask_for_help(helps.COMMANDS[name]))
    assert found == (DATA / f"help/{name}.txt").read_text("utf-8"), ADVICE


def test_every_command_has_a_data_file() -> None:
    from demucs_infer.cli.parser import COMMANDS

    assert {words[0] for words in helps.COMMANDS.values() if words} == set(COMMANDS)


def test_http_api_is_unchanged(tmp_path: Path) -> None:
    assert openapi.collect_openapi(tmp_path) == read_json("openapi.json"), ADVICE


@pytest.mark.usefixtures("one_thread")
def test_exit_codes_are_unchanged(tmp_path: Path) -> None:
    assert commands.collect_exit_codes(tmp_path) == read_json("exit_codes.json"), ADVICE


@pytest.mark.usefixtures("one_thread")
def test_manifest_has_the_same_keys_and_settings(tmp_path: Path) -> None:
    assert commands.collect_manifest(tmp_path) == read_json("stems_json.json"), ADVICE


# ── stems ──


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("roads")
    with ThreadPoolExecutor() as pool:
        every = pool.map(partial(roads.measure, folder), roads.THREADS)
        return dict(zip(roads.THREADS, every, strict=True))


def is_known() -> bool:
    return roads.fingerprint() in read_json("digests.json")


def unknown() -> str:
    """Say that this machine's last bits are not written down."""
    return f"no digests are stored for: {roads.fingerprint()}; `python -m tests.snapshot` adds them"


def assert_equal_digests(digests: dict[str, roads.Digests], *names: str) -> None:
    """Fail if files of some front ends differ."""
    first, *others = names
    assert set(digests[first]) == set(roads.STEMS)
    for other in others:
        assert digests[other] == digests[first], f"{other} and {first} differ; {hint()}"


@pytest.mark.parametrize("threads", roads.THREADS)
@pytest.mark.parametrize("song", ["plain", "loud"])
def test_all_front_ends_write_the_same_bytes(measured: Measured, song: str, threads: int) -> None:
    """A loud song gets one gain for all stems."""
    digests = measured[threads][song]["roads"]
    assert_equal_digests(digests, "command", "server", "batch", "run", "separate_to")


@pytest.mark.parametrize("threads", roads.THREADS)
@pytest.mark.parametrize("song", ["plain", "loud"])
def test_tensors_and_float_files_have_the_same_samples(
    measured: Measured, song: str, threads: int
) -> None:
    assert_equal_digests(
        measured[threads][song]["floats"], "run", "separate_audio_file", "separate_to"
    )


@pytest.mark.parametrize("threads", roads.THREADS)
def test_loudness_over_time_is_unchanged(measured: Measured, threads: int) -> None:
    expected = read_json("loudness.json")
    found: dict[str, list[float]] = measured[threads]["plain"]["loudness"]
    assert set(found) == set(expected)
    for stem, row in found.items():
        assert row == pytest.approx(expected[stem], abs=roads.TOLERANCE), f"{stem}; {hint()}"


def test_bytes_of_stems_are_unchanged(
    measured: Measured, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a machine that is not known the tests above are all that can be said."""
    known: dict[str, Any] = read_json("digests.json")
    found = roads.digests_of(measured)
    if not is_known():
        with capsys.disabled():
            print(f"\n{unknown()}")
        # What is written down for others has to be of the same form, whatever it says.
        assert known and all(found.keys() == one.keys() for one in known.values()), unknown()
        return
    assert found == known[roads.fingerprint()], ADVICE


def hint() -> str:
    return "digests of this machine are stored" if is_known() else unknown()
