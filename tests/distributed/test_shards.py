"""Shards, workers at the same track, and tracks that share batches give the same stems."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from demucs_infer.cli.main import main
from tests.helpers.batch_runs import (
    MODEL,
    batch_words,
    model_flags,
    read_table,
    stem_digests,
    write_list,
    write_mixed_manifest,
)
from tests.helpers.cli_process import RATE, environment, load, write_song


def test_shards_make_the_same_stems(
    repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["batch", str(write_mixed_manifest(tmp_path, 12)), *model_flags(repo)]
    assert main([*words, "-o", str(tmp_path / "whole"), "--json"]) == 1
    summary = json.loads(capsys.readouterr().out)
    assert (summary["tracks"], summary["done"], summary["failed"]) == (12, 11, 1)
    codes = [main([*words, "-o", str(tmp_path / "parts"), "--shard", f"{i}/3"]) for i in range(3)]
    assert sorted(codes) == [0, 0, 1]
    assert len(stem_digests(tmp_path / "whole")) == 11 * 4
    assert stem_digests(tmp_path / "parts") == stem_digests(tmp_path / "whole")
    tables = [read_table(tmp_path / f"parts/results-{i}-of-3.jsonl") for i in range(3)]
    assert sum(map(len, tables)) == 12


def test_track_in_use_by_another_shard_comes_last_and_is_skipped(
    repo: Path, tmp_path: Path
) -> None:
    for seed, (name, seconds) in enumerate({"song": 60, "first": 1, "second": 1}.items()):
        write_song(tmp_path / f"{name}.wav", seconds, seed=seed)
    manifest = write_list(tmp_path, "song.wav", "song.wav", "first.wav", "second.wav")
    words = [*batch_words(manifest, repo, tmp_path / "out"), "--shard"]
    first = subprocess.Popen(
        [sys.executable, "-m", "demucs_infer", *words, "0/2"], env=environment()
    )
    with first:
        while not list(tmp_path.glob(f"out/{MODEL}/.partial/*/journal")):
            assert first.poll() is None
            time.sleep(0.01)
        assert main([*words, "1/2"]) == 0
        assert first.wait() == 0
    shards = [read_table(tmp_path / f"out/results-{i}-of-2.jsonl") for i in range(2)]
    song = [row for shard in shards for row in shard if row["track"] == "song.wav"]
    assert [row["status"] for row in song] == ["done", "skipped"]
    assert song[0]["stems"] == song[1]["stems"]
    assert [row["track"] for row in shards[1]] == ["second.wav", "song.wav"]


def test_tracks_that_share_batches_differ_only_by_rounding(repo: Path, tmp_path: Path) -> None:
    """Class B: a product with more rows may sum in another order."""
    names = [f"{n}.wav" for n in range(5)]
    for n, name in enumerate(names):
        write_song(tmp_path / name, 0.5 + 0.7 * n, seed=n)
    words = [*batch_words(write_list(tmp_path, *names), repo), "-n", "4f2b8e3d"]
    words += ["--shifts", "0", "--float32", "--batch-size", "4"]
    batch_sizes: dict[str, list[int]] = {"1": [], "3": []}
    for together, sizes in batch_sizes.items():

        def record(module: nn.Module, inputs: Any, sizes: list[int] = sizes) -> None:
            if inputs and isinstance(inputs[0], torch.Tensor) and inputs[0].shape[1:] == (2, RATE):
                sizes.append(len(inputs[0]))

        with nn.modules.module.register_module_forward_pre_hook(record):
            assert main([*words, "-o", str(tmp_path / together), "--together", together]) == 0
    assert sum(batch_sizes["1"]) == sum(batch_sizes["3"])
    assert len(batch_sizes["3"]) < len(batch_sizes["1"])
    for path in (tmp_path / "1").rglob("*.wav"):
        alone = load(path)
        shared = load(tmp_path / "3" / path.relative_to(tmp_path / "1"))
        error = ((alone - shared) ** 2).sum() / (alone**2).sum()
        assert error <= 1e-10 and abs(alone - shared).max() <= 1e-5  # 100 dB
