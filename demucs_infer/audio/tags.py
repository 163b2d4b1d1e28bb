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


@dataclass(frozen=True, slots=True)
class Cover:
    """A picture that players show: JPEG or PNG, up to 16 MiB. It is copied, never decoded."""

    data: bytes

    def __post_init__(self) -> None:
        if not all(self.size) or len(self.data) >= 1 << 24:  # where FLAC's picture block ends
            raise ValueError(f"{len(self.data)} bytes that are no JPEG or PNG of up to 16 MiB")

    @property
    def codec(self) -> str:
        """FFmpeg's name for the kind of picture."""
        return "png" if self.data.startswith(b"\x89PNG\r\n\x1a\n") else "mjpeg"

    @property
    def size(self) -> tuple[int, int]:
        """Width and height as the header says; zeros where there is none."""
        if self.codec == "png":
            width, height = self.data[16:20], self.data[20:24]
            return int.from_bytes(width, "big"), int.from_bytes(height, "big")
        return _jpeg_size(self.data)


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Width and height from the frame header of a JPEG; zeros where there is none."""
    place = 2 if data.startswith(b"\xff\xd8\xff") else len(data)
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # those are tables
            height, width = data[place + 5 : place + 7], data[place + 7 : place + 9]
            return int.from_bytes(width, "big"), int.from_bytes(height, "big")
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return 0, 0


def cover_of(data: bytes | None) -> Cover | None:
    """The picture in those bytes; None where there is none that a file can carry."""
    try:
        return Cover(data) if data else None
    except ValueError:
        return None


def portable_tags(tags: Mapping[str, str], title_suffix: str = "") -> dict[str, str]:
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
