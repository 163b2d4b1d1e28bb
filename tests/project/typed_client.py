"""A program with types, as a user of the package would write it; `test_typing.py` checks it."""

from pathlib import Path

from torch import Tensor

from demucs_infer import (
    ChunkProcessed,
    InferenceOutput,
    OutputOptions,
    SeparatedFiles,
    SeparationOptions,
    Separator,
    get_model,
)
from demucs_infer.audio import save_audio


def separate(song: Path, folder: Path) -> dict[str, Tensor]:
    """Use all ways to separate a song."""
    options = SeparationOptions(shifts=2, overlap=0.25)
    with Separator("htdemucs", device="cpu", stems=["vocals"], options=options) as separator:
        output: InferenceOutput = separator.run(song)
        paths: dict[str, Path] = output.save(folder, "flac", bits=24)
        files: SeparatedFiles = separator.separate_to(song, folder, "mp3", bitrate=192)
        for event in separator.stream(song):
            if isinstance(event, ChunkProcessed):
                print(f"{event.fraction:.0%}")
    print(paths["vocals"].name, files.gains["vocals"], OutputOptions().format)
    model = Separator.from_model(get_model("htdemucs"), jobs=1)
    return model.run(song.read_bytes()).outputs


def save(stems: dict[str, Tensor], clip: str, bits: int) -> None:
    """Save stems with values that come from flags or a file, as upstream's users do."""
    for name, wav in stems.items():
        save_audio(wav, f"{name}.wav", 44100, clip=clip, bits_per_sample=bits)


def misuse(separator: Separator) -> int:
    """Use two wrong types, each of which a checker reports."""
    separator.run("song.mp3", sample_rate="44100")  # expected error
    return separator.run("song.mp3")["vocals"]  # expected error
