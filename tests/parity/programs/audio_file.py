"""A program that looks into a file and reads parts of it."""

from demucs.audio import AudioFile, convert_audio_channels, f32_pcm, i16_pcm, prevent_clip

file = AudioFile(TRACK)
whole = file.read(streams=0)
part = file.read(seek_time=1.0, duration=0.5, streams=slice(None), channels=1)
facts = file.samplerate(), file.channels(), len(file), round(file.duration, 3), tuple(part.shape)
result = {
    "whole": whole,
    "part": part[0],
    "mono": convert_audio_channels(whole, 1),
    "steps": f32_pcm(i16_pcm(whole.clone())),
    "rescaled": prevent_clip(9 * whole, mode="rescale"),
    "soft": prevent_clip(9 * whole, mode="tanh"),
}
