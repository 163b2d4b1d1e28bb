"""Copy tags and cover art from a source file to the stems."""

from collections.abc import Mapping
from dataclasses import dataclass

# Tags that describe the file and not the music: lengths, delays, containers.
_FILE_SPECIFIC = {
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
_LOUDNESS_PREFIXES = ("replaygain_", "r128_", "mp3gain_")
_MAX_BYTES = 1 << 20  # larger tags are not copied to every stem


@dataclass(frozen=True, slots=True)
class Cover:
    """A cover picture: JPEG or PNG, up to 16 MiB. It is copied, never decoded."""

    data: bytes

    def __post_init__(self) -> None:
        if not all(self.size) or len(self.data) >= 1 << 24:  # where FLAC's picture block ends
            raise ValueError(
                f"unsupported cover picture of {len(self.data)} bytes: expected JPEG or PNG of up "
                "to 16 MiB"
            )

    @property
    def codec(self) -> str:
        """FFmpeg's name of the picture format."""
        return "png" if self.data.startswith(b"\x89PNG\r\n\x1a\n") else "mjpeg"

    @property
    def size(self) -> tuple[int, int]:
        """Width and height according to the header; zeros if it is invalid."""
        if self.codec == "png":
            width, height = self.data[16:20], self.data[20:24]
            return int.from_bytes(width, "big"), int.from_bytes(height, "big")
        return _jpeg_size(self.data)


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Return width and height from the frame header of a JPEG; zeros if it is invalid."""
    position = 2 if data.startswith(b"\xff\xd8\xff") else len(data)
    while position + 9 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # tables
            height, width = data[position + 5 : position + 7], data[position + 7 : position + 9]
            return int.from_bytes(width, "big"), int.from_bytes(height, "big")
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return 0, 0


def parse_cover(data: bytes | None) -> Cover | None:
    """Return the picture in `data`; None without data, or for an unsupported format."""
    try:
        return Cover(data) if data else None
    except ValueError:
        return None


def portable_tags(tags: Mapping[str, str], title_suffix: str = "") -> dict[str, str]:
    """Return the tags of a file that also apply to its stems, by lower-case name.

    `title_suffix`, such as `" (vocals)"`, is appended to the title, if there is one.
    """
    portable: dict[str, str] = {}
    for name, value in tags.items():
        key = name.lower()
        if key in _FILE_SPECIFIC or key.startswith(_LOUDNESS_PREFIXES) or len(value) > _MAX_BYTES:
            continue
        portable[key] = value.replace("\0", "")
    if "title" in portable:
        portable["title"] += title_suffix
    return portable
