"""Read and write audio files; offer the public names of upstream's module `demucs.audio`."""

from typing import TYPE_CHECKING

from demucs_infer.system.lazy import make_getattr

if TYPE_CHECKING:
    from demucs_infer.audio.channels import convert_audio as convert_audio
    from demucs_infer.audio.gain import prevent_clip as prevent_clip
    from demucs_infer.audio.upstream import AudioFile as AudioFile
    from demucs_infer.audio.upstream import as_dtype_pcm as as_dtype_pcm
    from demucs_infer.audio.upstream import convert_audio_channels as convert_audio_channels
    from demucs_infer.audio.upstream import encode_ffmpeg as encode_ffmpeg
    from demucs_infer.audio.upstream import encode_mp3 as encode_mp3
    from demucs_infer.audio.upstream import encode_wav as encode_wav
    from demucs_infer.audio.upstream import f32_pcm as f32_pcm
    from demucs_infer.audio.upstream import i16_pcm as i16_pcm
    from demucs_infer.audio.writer import save_audio as save_audio

_LAZY_IMPORTS = {
    "AudioFile": "demucs_infer.audio.upstream",
    "as_dtype_pcm": "demucs_infer.audio.upstream",
    "convert_audio": "demucs_infer.audio.channels",
    "convert_audio_channels": "demucs_infer.audio.upstream",
    "encode_ffmpeg": "demucs_infer.audio.upstream",
    "encode_mp3": "demucs_infer.audio.upstream",
    "encode_wav": "demucs_infer.audio.upstream",
    "f32_pcm": "demucs_infer.audio.upstream",
    "i16_pcm": "demucs_infer.audio.upstream",
    "prevent_clip": "demucs_infer.audio.gain",
    "save_audio": "demucs_infer.audio.writer",
}
__all__ = [
    "AudioFile",
    "as_dtype_pcm",
    "convert_audio",
    "convert_audio_channels",
    "encode_ffmpeg",
    "encode_mp3",
    "encode_wav",
    "f32_pcm",
    "i16_pcm",
    "prevent_clip",
    "save_audio",
]

__getattr__ = make_getattr(
    __name__, _LAZY_IMPORTS, aliases={"julius": "julius", "lameenc": "lameenc"}
)


def __dir__() -> list[str]:
    return __all__
