"""Test that a spool continues with valid blocks, and drops incomplete or damaged ones."""

import threading
from pathlib import Path

import pytest
import torch

from demucs_infer.audio.spool import Spool, SpoolAbandoned
from tests.helpers.audio_signals import make_noise


def make_blocks(count: int) -> list[torch.Tensor]:
    return [make_noise(6, 1000 + 17 * k, k).view(3, 2, -1) for k in range(count)]


def fill(folder: Path, count: int) -> Spool:
    spool = Spool(folder, 3, 2)
    for block in make_blocks(count):
        spool.append(block)
    return spool


def count_frames(folder: Path) -> int:
    spool = Spool(folder, 3, 2)
    spool.abandon()
    return spool.frames


def test_blocks_can_be_read_while_others_are_appended(tmp_path: Path) -> None:
    spool, received = Spool(tmp_path, 3, 2), []
    reader = threading.Thread(target=lambda: received.extend(spool.blocks()))
    reader.start()
    for block in make_blocks(5):
        spool.append(block)
    spool.finish()
    reader.join()
    assert torch.equal(torch.cat(received, -1), torch.cat(make_blocks(5), -1))


def test_later_spool_continues_the_files(tmp_path: Path) -> None:
    fill(tmp_path, 2).abandon()
    spool = Spool(tmp_path, 3, 2)
    assert spool.frames == 1000 + 1017
    spool.append(make_blocks(3)[2])
    spool.finish()
    assert torch.equal(torch.cat(list(spool.blocks()), -1), torch.cat(make_blocks(3), -1))


@pytest.mark.parametrize("cut", [1, 7, 8 * 3 * 1000, 24 * 1000 + 1])
def test_truncated_file_is_valid_up_to_a_complete_block(tmp_path: Path, cut: int) -> None:
    fill(tmp_path, 3).abandon()
    data = tmp_path / "samples.f32"
    with data.open("r+b") as file:
        file.truncate(data.stat().st_size - cut)
    # Blocks of 24 bytes a sample: 1000, 1017, 1034 samples long.
    length = 2017 if cut <= 24 * 1034 else 1000
    spool = Spool(tmp_path, 3, 2)
    assert spool.frames == length
    spool.finish()
    assert torch.equal(
        torch.cat(list(spool.blocks()), -1), torch.cat(make_blocks(3), -1)[..., :length]
    )


def test_zeros_after_a_power_loss_and_truncated_lines_are_dropped(tmp_path: Path) -> None:
    fill(tmp_path, 3).abandon()
    with (tmp_path / "samples.f32").open("r+b") as file:
        file.seek(24 * 1500)
        file.write(bytes(100))
    assert count_frames(tmp_path) == 1000
    journal = tmp_path / "journal"
    journal.write_text(journal.read_text()[:-4])
    assert count_frames(tmp_path) == 0


def test_reader_gets_the_error_of_a_failed_spool(tmp_path: Path) -> None:
    spool = fill(tmp_path, 1)
    reader = spool.blocks()
    next(reader)
    spool.fail(RuntimeError("the network broke"))
    with pytest.raises(RuntimeError, match="broke"):
        next(reader)
    spool = Spool(tmp_path, 3, 2)
    with pytest.raises(ValueError, match="shape"):
        spool.append(torch.zeros(2, 2, 5))
    spool.abandon_unless_finished()
    with pytest.raises(SpoolAbandoned):
        next(spool.blocks())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_full_disk_is_reported_once_and_complete_blocks_stay(tmp_path: Path) -> None:
    spool = fill(tmp_path, 2)
    spool._data_file.close()
    spool._data_file = Path("/dev/full").open("ab")  # noqa: SIM115 (the spool closes it)
    with pytest.raises(OSError, match="No space left") as caught:
        spool.append(make_blocks(1)[0][..., :10])  # so few that they are buffered first
    spool.fail(caught.value)  # the buffered samples must not fail again
    assert count_frames(tmp_path) == sum(block.shape[-1] for block in make_blocks(2))
