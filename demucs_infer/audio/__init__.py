"""Audio files and codecs, and the public names of upstream's module `demucs.audio`."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from demucs_infer.audio.channels import convert_audio as convert_audio
    from demucs_infer.audio.gain import prevent_clip as prevent_clip
    from demucs_infer.audio.upstream import AudioFile as AudioFile
    from demucs_infer.audio.upstream import as_dtype_pcm as as_dtype_pcm
    from demucs_infer.audio.upstream import convert_audio_channels as convert_audio_channels
    from demucs_infer.audio.upstream import encode_mp3 as encode_mp3
    from demucs_infer.audio.upstream import encode_wav as encode_wav
    from demucs_infer.audio.upstream import f32_pcm as f32_pcm
    from demucs_infer.audio.upstream import i16_pcm as i16_pcm
    from demucs_infer.audio.writer import save_audio as save_audio

_LAZY_IMPORTS = {
    "AudioFile": "upstream",
    "as_dtype_pcm": "upstream",
    "convert_audio": "channels",
    "convert_audio_channels": "upstream",
    "encode_mp3": "upstream",
    "encode_wav": "upstream",
    "f32_pcm": "upstream",
    "i16_pcm": "upstream",
    "prevent_clip": "gain",
    "save_audio": "writer",
}
__all__ = [
    "AudioFile",
    "as_dtype_pcm",
    "convert_audio",
    "convert_audio_channels",
    "encode_mp3",
    "encode_wav",
    "f32_pcm",
    "i16_pcm",
    "prevent_clip",
    "save_audio",
]


def __getattr__(name: str) -> object:
    """Import a public name on first use, so that `import demucs_infer.audio` stays cheap."""
    if name not in _LAZY_IMPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_LAZY_IMPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY_IMPORTS})
