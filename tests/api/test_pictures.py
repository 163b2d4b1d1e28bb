"""Pictures of stems and scores are valid, and show what was heard."""

import io
import re
from pathlib import Path
from xml.etree import ElementTree

import av
import pytest
import torch

from demucs_infer import InferenceOutput
from demucs_infer.cli.main import main
from demucs_infer.metrics import Evaluation, fullness_bleedless, score
from demucs_infer.pictures import (
    draw_boxplot,
    draw_spectrogram,
    draw_stems,
    draw_waveform,
    encode_png,
    measure_peaks,
    measure_spectrogram,
)
from tests.helpers.audio_signals import make_noise
from tests.helpers.cli_process import save

RATE = 8000


def tone(hertz: float, seconds: float = 2.0) -> torch.Tensor:
    time = torch.arange(round(seconds * RATE)) / RATE
    return 0.5 * torch.sin(2 * torch.pi * hertz * time).expand(2, -1)


def test_png_decodes_to_its_pixels() -> None:
    pixels = torch.randint(0, 3, (5, 7), dtype=torch.uint8)
    palette = torch.tensor([(0, 0, 0), (200, 10, 20), (255, 255, 255)], dtype=torch.uint8)
    data = encode_png(pixels, palette)
    with av.open(io.BytesIO(data)) as container:
        (frame,) = container.decode(video=0)
    decoded = torch.from_numpy(frame.to_ndarray(format="rgb24"))
    assert torch.equal(decoded, palette[pixels.long()])


def test_tone_is_brightest_at_its_frequency() -> None:
    decibels = measure_spectrogram(tone(1000), RATE, bands=64, columns=20)
    edges = torch.logspace(torch.log10(torch.tensor(40.0)), torch.log10(torch.tensor(4000.0)), 65)
    loudest = int(decibels.mean(1).argmax())
    assert edges[loudest - 1] <= 1000 <= edges[loudest + 2]
    assert decibels.max() == 0 and decibels.shape == (64, 20)


def test_waveform_has_the_peaks_of_its_parts() -> None:
    samples = torch.zeros(2, 1000)
    samples[1, 250:260] = -0.8
    peaks = measure_peaks(samples, 10)
    assert peaks == pytest.approx([0, 0, 0.8, *[0] * 7])
    ElementTree.fromstring(draw_waveform(samples))


@pytest.mark.parametrize("length", [1, 100, 20000])
def test_stems_of_any_length_are_drawn(length: int) -> None:
    stems = {"vocals": make_noise(2, length), "a < b": torch.zeros(2, length)}
    root = ElementTree.fromstring(draw_stems(stems, RATE, "x & y"))
    assert [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")][0] == "x & y"
    assert draw_spectrogram(stems["vocals"], RATE).startswith(b"\x89PNG")


def test_boxplot_marks_every_value() -> None:
    root = ElementTree.fromstring(draw_boxplot({"drums": [1.0, 5.0, 6.0], "bass": []}, "dB"))
    circles = list(root.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(circles) == 3


def test_output_shows_itself_in_one_line_and_as_players() -> None:
    output = InferenceOutput({"vocals": make_noise(2, RATE), "other": tone(300, 1)}, RATE)
    assert repr(output) == "InferenceOutput(vocals, other: 2 channels, 1.0 s at 8000 Hz)"
    html = output._repr_html_()
    assert html.count("<audio controls") == 2 and html.count("<svg") == 2
    assert "The first" not in html
    assert re.search(r"data:audio/mpeg;base64,(SUQz|//)", html)


def test_fullness_and_bleedless_tell_what_is_missing_from_what_is_too_much() -> None:
    low, high = tone(300), tone(2500)
    assert fullness_bleedless(low, low, RATE) == (100, 100)
    full, bleed = fullness_bleedless(low, low + high, RATE) or (0, 0)
    assert full > 90 > bleed
    less, clean = fullness_bleedless(low + high, low, RATE) or (0, 0)
    assert clean > 90 > less
    assert fullness_bleedless(torch.zeros(2, RATE), low[:, :RATE], RATE) is None


def test_page_of_scores_has_boxes_and_rows() -> None:
    truth = {"a <b>": tone(300), "c": tone(900)}
    rows = score(
        "song", truth, {name: stem * 0.9 for name, stem in truth.items()}, sample_rate=RATE
    )
    page = Evaluation(tuple(rows)).html()
    assert page.count("<svg") == 3 and "a &lt;b&gt;" in page and "20.00" in page


def test_plot_command_draws_the_stems_of_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("drums", "vocals"):
        save(tmp_path / f"{name}.wav", make_noise(2, RATE))
    assert main(["plot", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'stems.svg'}\n"
    root = ElementTree.parse(tmp_path / "stems.svg").getroot()
    assert len(list(root.iter("{http://www.w3.org/2000/svg}image"))) == 2
    (tmp_path / "empty").mkdir()
    assert main(["plot", str(tmp_path / "empty")]) == 2
    assert "no stems in" in capsys.readouterr().err
