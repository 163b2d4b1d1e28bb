"""What a file says about its music, carried to the files made from it."""

from collections.abc import Mapping
from dataclasses import dataclass

# True of the source's own bytes and of no other file: lengths and delays, loudness, containers.
_OF_THE_FILE = {
    "acoustid_fingerprint",
    "compatible_brands",
    "creation_time",
    "encoded_by",
    "encoder",
    "encoding_tool",
    "handler_name",
    "itunnorm",
    "itunpgap",
    "itunsmpb",
    "language",
    "major_brand",
    "metadata_block_picture",
    "minor_version",
    "stem",
    "tlen",
    "tsse",
    "vendor_id",
    "waveformatextensible_channel_mask",
}
_OF_THE_LEVEL = ("replaygain_", "r128_", "mp3gain_")
_MAX_BYTES = 1 << 20  # no song needs more; a larger one is not worth a copy in every stem

_MAGIC = {b"\xff\xd8\xff": "jpeg_pipe", b"\x89PNG\r\n\x1a\n": "png_pipe"}


@dataclass(frozen=True, slots=True)
class Cover:
    """A picture that players show: JPEG or PNG, up to 16 MiB."""

    data: bytes

    def __post_init__(self) -> None:
        if not self.demuxer or len(self.data) >= 1 << 24:  # where FLAC's picture block ends
            raise ValueError(f"{len(self.data)} bytes that are no JPEG or PNG of up to 16 MiB")

    @property
    def demuxer(self) -> str:
        """The name under which FFmpeg reads it; empty for what is no picture."""
        return next((name for magic, name in _MAGIC.items() if self.data.startswith(magic)), "")


def cover_of(data: bytes | None) -> Cover | None:
    """The picture in those bytes; None where there is none that a file can carry."""
    try:
        return Cover(data) if data else None
    except ValueError:
        return None


def carried(tags: Mapping[str, str], title_suffix: str = "") -> dict[str, str]:
    """The tags that stay true of a file made from the one that had them.

    `title_suffix`, such as `" (vocals)"`, is added to the title, if there is one.
    """
    kept: dict[str, str] = {}
    for name, value in tags.items():
        key = name.lower()
        if key in _OF_THE_FILE or key.startswith(_OF_THE_LEVEL) or len(value) > _MAX_BYTES:
            continue
        kept[key] = value.replace("\0", "")
    if "title" in kept:
        kept["title"] += title_suffix
    return kept
