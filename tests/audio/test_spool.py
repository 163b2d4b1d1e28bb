"""What was entered in the journal is had again; what was not, or is damaged, is not believed."""

import threading
from pathlib import Path

import pytest
import torch

from demucs_infer.audio.spool import Spool, SpoolAbandoned
from tests.helpers.audio_signals import make_noise


def blocks(count: int) -> list[torch.Tensor]:
    return [make_noise(6, 1000 + 17 * k, k).view(3, 2, -1) for k in range(count)]


def fill(folder: Path, count: int) -> Spool:
    spool = Spool(folder, 3, 2)
    for block in blocks(count):
        spool.append(block)
    return spool


def kept(folder: Path) -> int:
    spool = Spool(folder, 3, 2)
    spool.abandon()
    return spool.frames


def test_samples_come_back_exactly_while_more_are_coming(tmp_path: Path) -> None:
    spool, found = Spool(tmp_path, 3, 2), []
    reader = threading.Thread(target=lambda: found.extend(spool.blocks()))
    reader.start()
    for block in blocks(5):
        spool.append(block)
    spool.finish()
    reader.join()
    assert torch.equal(torch.cat(found, -1), torch.cat(blocks(5), -1))


def test_a_later_process_goes_on_where_it_stopped(tmp_path: Path) -> None:
    fill(tmp_path, 2).abandon()
    spool = Spool(tmp_path, 3, 2)
    assert spool.frames == 1000 + 1017
    spool.append(blocks(3)[2])
    spool.finish()
    assert torch.equal(torch.cat(list(spool.blocks()), -1), torch.cat(blocks(3), -1))


@pytest.mark.parametrize("cut", [1, 7, 8 * 3 * 1000, 24 * 1000 + 1])
def test_a_file_that_was_cut_short_is_believed_up_to_a_whole_block(
    tmp_path: Path, cut: int
) -> None:
    fill(tmp_path, 3).abandon()
    data = tmp_path / "samples.f32"
    with data.open("r+b") as file:
        file.truncate(data.stat().st_size - cut)
    # Blocks of 24 bytes a sample: 1000, 1017, 1034 samples long.
    left = 2017 if cut <= 24 * 1034 else 1000
    spool = Spool(tmp_path, 3, 2)
    assert spool.frames == left
    spool.finish()
    assert torch.equal(torch.cat(list(spool.blocks()), -1), torch.cat(blocks(3), -1)[..., :left])


def test_zeros_after_a_power_cut_and_half_a_line_are_not_believed(tmp_path: Path) -> None:
    fill(tmp_path, 3).abandon()
    with (tmp_path / "samples.f32").open("r+b") as file:
        file.seek(24 * 1500)
        file.write(bytes(100))
    assert kept(tmp_path) == 1000
    journal = tmp_path / "journal"
    journal.write_text(journal.read_text()[:-4])
    assert kept(tmp_path) == 0


def test_who_follows_hears_of_the_end(tmp_path: Path) -> None:
    spool = fill(tmp_path, 1)
    follower = spool.blocks()
    next(follower)
    spool.fail(RuntimeError("the network broke"))
    with pytest.raises(RuntimeError, match="broke"):
        next(follower)
    spool = Spool(tmp_path, 3, 2)
    with pytest.raises(ValueError, match="shape"):
        spool.append(torch.zeros(2, 2, 5))
    spool.abandon_unless_finished()
    with pytest.raises(SpoolAbandoned):
        next(spool.blocks())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_a_full_disk_is_told_once_and_what_was_kept_stays(tmp_path: Path) -> None:
    spool = fill(tmp_path, 2)
    spool._data_file.close()
    spool._data_file = Path("/dev/full").open("ab")  # noqa: SIM115 (the spool closes it)
    with pytest.raises(OSError, match="No space left") as caught:
        spool.append(blocks(1)[0][..., :10])  # so little that it lies in a buffer first
    spool.fail(caught.value)  # what its file still held would make it fail again
    assert kept(tmp_path) == sum(block.shape[-1] for block in blocks(2))
