"""Mutate files by their structure: pickles opcode by opcode, headers field by field."""

import contextlib
import io
import json
import pickletools
import random
import re
import struct
import zipfile
from collections.abc import Sequence
from typing import Any

NUMBERS = (0, 1, 2, -1, 7, 127, 128, 255, 256, 32767, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1)
NUMBERS += (2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
TEXTS = ("", "a", "\0", "..", "../../x", "/etc/passwd", "posix.system", "é" * 50, "x" * 5000, "{}")
VALUES: tuple[Any, ...] = (
    *NUMBERS,
    *TEXTS,
    None,
    True,
    0.5,
    -1e300,
    1e-300,
    [],
    {},
    [[]],
    [0] * 99,
)

MAX_TEXT = 1_000_000


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:  # noqa: C901 (a list of ways)
    """Change, cut, repeat or move a few bytes, more often near the beginning."""
    raw = bytearray(data)
    for _ in range(1 + int(rng.expovariate(0.7))):
        if not raw:
            break
        reach = rng.choice((16, 64, 512, len(raw), len(raw)))
        at = rng.randrange(min(reach, len(raw)))
        if rng.random() < 0.2:
            at = len(raw) - 1 - at
        length = min(rng.choice((1, 2, 4, 8, 16, 100, 1000)), len(raw) - at)
        match rng.randrange(9):
            case 0:
                raw[at] ^= 1 << rng.randrange(8)
            case 1:
                raw[at] = rng.randrange(256)
            case 2 | 3:
                _put_number(raw, at, rng)
            case 4:
                raw[at : at + length] = rng.randbytes(length)
            case 5:
                del raw[at : at + length]
            case 6:
                raw[at:at] = raw[at : at + length] * rng.choice((1, 2, 20))
            case 7:
                raw[at : at + length] = bytes(length)
            case 8:
                del raw[at if rng.random() < 0.5 else len(raw) - at // 8 :]
    return bytes(raw)


def _put_number(raw: bytearray, at: int, rng: random.Random) -> None:
    """Write a number of 1, 2, 4 or 8 bytes, of either byte order, that programs stumble over."""
    size = rng.choice((1, 2, 4, 4, 8))
    order = "little" if rng.random() < 0.5 else "big"
    number = rng.choice(NUMBERS) + rng.choice((0, 0, 0, -1, 1, 7))
    raw[at : at + size] = (number % 256**size).to_bytes(size, order)  # type: ignore[arg-type]


_NAME = re.compile(rb"[A-Za-z][A-Za-z0-9 ]{3}|OggS|\x1aE\xdf\xa3|ID3")


def mutate_chunks(data: bytes, rng: random.Random) -> bytes:
    """Change the numbers around the four-letter names of chunks, or move whole chunks."""
    places = [match.start() for match in _NAME.finditer(data[: 1 << 16])]
    if not places:
        return mutate_bytes(data, rng)
    raw = bytearray(data)
    for _ in range(1 + int(rng.expovariate(1))):
        at = rng.choice(places)
        match rng.randrange(4):
            case 0 | 1:
                offset = rng.choice((-8, -4, 4, 4, 8, 12, 16, 20, 22))
                _put_number(raw, min(max(at + offset, 0), len(raw)), rng)
            case 2:
                other = rng.choice(places)
                length = rng.choice((8, 16, 64, 512))
                raw[at:at] = data[other : other + length]
            case 3:
                other = rng.choice(places)
                raw[at : at + 4] = data[other : other + 4]
    return bytes(raw)


def splice(first: bytes, second: bytes, rng: random.Random) -> bytes:
    """Continue one file with the rest of another."""
    return first[: rng.randrange(len(first) + 1)] + second[rng.randrange(len(second) + 1) :]


# ── pickles ──


def attacks(canary: str) -> tuple[bytes, ...]:
    """Return opcodes that would create a file, or exhaust memory, if they were executed."""
    word = f"touch {canary}".encode()
    code = f"open({canary!r}, 'w')".encode()
    deep = b")" + b"\x85" * 30_000
    laughs = b"]q\x40" + b"".join(
        b"0](" + bytes([ord("h"), level]) * 10 + bytes([ord("e"), ord("q"), level + 1])
        for level in range(0x40, 0x4A)
    )
    return (
        b"cposix\nsystem\n(V" + word + b"\ntR",
        b"cbuiltins\nexec\n(V" + code + b"\ntR",
        b"cbuiltins\neval\nV" + code + b"\n\x85R",
        b"\x8c\x05posix\x8c\x06system\x93V" + word + b"\n\x85R",
        b"(V" + word + b"\nios\nsystem\n",
        b"(cos\nsystem\nV" + word + b"\no",
        b"cos\nsystem\nV" + word + b"\n\x85\x81",
        b"cos\nsystem\nV" + word + b"\n\x85}\x92",
        b"csubprocess\nPopen\n](V/bin/touch\nV" + canary.encode() + b"\ne\x85R",
        b"cbuiltins\ngetattr\ncos\npath\nVexists\n\x86R",
        b"ctorch\nload\nV" + canary.encode() + b"\n\x85R",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ccollections\nOrderedDict\n)R",
        b"cfractions\nFraction\nV1e999999\n\x85R",
        b"(Vmodule\ncos\nsystem\nVx\nVy\ntQ",
        b"}b", b"Q", b"\x82\x01", b"\x97", b"\x98", b"Px\n",
        b"\x8d" + struct.pack("<Q", 2**40), b"\x96" + struct.pack("<Q", 2**40),
        b"\x8b" + struct.pack("<i", 2**30), b"Nr\xff\xff\xff\x7f", b"L" + b"9" * 6000 + b"L\n",
        deep, laughs, b"]" * 3000, b"(" * 3000,
    )  # fmt: skip


_PIECES = (b"(", b")", b"]", b"}", b"N", b"0", b"1", b"2", b"t", b"\x85", b"\x86", b"\x87")
_PIECES += (
    b"a",
    b"e",
    b"s",
    b"u",
    b"d",
    b"l",
    b"R",
    b"b",
    b"\x88",
    b"\x89",
    b"K\x05",
    b"G" + b"\x7f" * 8,
)
_PIECES += (b"q\x00", b"h\x00", b"\x94", b".", b"X\x01\0\0\0a", b"\x8a\x02\xff\xff", b"M\xff\xff")


def cut_pickle(program: bytes) -> list[bytes]:
    """Return the opcodes of a pickle, each with its argument; the rest, if it is damaged."""
    starts: list[int] = []
    with contextlib.suppress(ValueError):
        starts += [at for _, _, at in pickletools.genops(program) if at is not None]
    return [program[at:end] for at, end in zip(starts, [*starts[1:], len(program)])]


def mutate_pickle(program: bytes, rng: random.Random, canary: str) -> bytes:
    """Remove, repeat, swap, change and insert opcodes."""
    pieces = cut_pickle(program)
    if len(pieces) < 3:
        return mutate_bytes(program, rng)
    for _ in range(1 + int(rng.expovariate(0.7))):
        at = rng.randrange(1, len(pieces))
        match rng.randrange(8):
            case 0:
                del pieces[at]
                if len(pieces) < 2:
                    break
            case 1:
                pieces.insert(at, pieces[at])
            case 2:
                other = rng.randrange(1, len(pieces))
                pieces[at], pieces[other] = pieces[other], pieces[at]
            case 3:
                pieces.insert(at, rng.choice(_PIECES))
            case 4:
                pieces[at] = rng.choice(_PIECES)
            case 5:
                place = pieces.insert if rng.random() < 0.5 else pieces.__setitem__
                place(at, rng.choice(attacks(canary)))
            case _:
                pieces[at] = _change_argument(pieces[at], rng)
    return b"".join(pieces)


def _change_argument(piece: bytes, rng: random.Random) -> bytes:
    if piece[:1] in b"KMJ\x8a":  # a number
        number = rng.choice(NUMBERS)
        size = (number.bit_length() + 8) // 8
        return b"\x8a" + bytes([size]) + number.to_bytes(size, "little", signed=True)
    if piece[:1] in b"X\x8c" and rng.random() < 0.7:
        text = rng.choice(TEXTS).encode()
        return b"X" + struct.pack("<I", len(text)) + text
    if piece[:1] == b"c":
        names = (b"cposix\nsystem\n", b"cbuiltins\nexec\n", b"ctorch\nFloatStorage\n")
        names += (b"ctorch\nLongStorage\n", b"ctorch.nn\nLinear\n", b"cdemucs.demucs\nDemucs\n")
        return rng.choice(names)
    return piece[:1] + mutate_bytes(piece[1:], rng)


def mutate_zip(data: bytes, rng: random.Random, canary: str) -> bytes:
    """Change the pickle, another entry, the order of entries, or fields of the directory."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    kind = rng.randrange(10)
    if kind < 6:
        name = next(name for name in entries if name.endswith("data.pkl"))
        entries[name] = mutate_pickle(entries[name], rng, canary)
    elif kind < 8:
        name = rng.choice([*entries])
        entries[name] = mutate_bytes(entries[name], rng)
    out = join_zip(entries, compress=rng.random() < 0.02)
    if kind == 8:
        raw = bytearray(out)
        directory = raw.find(b"PK\x01\x02")
        for _ in range(rng.randrange(1, 4)):
            _put_number(raw, rng.randrange(directory, len(raw)), rng)
        return bytes(raw)
    return mutate_bytes(out, rng) if kind == 9 else out


def join_zip(entries: dict[str, bytes], *, compress: bool = False) -> bytes:
    """Return an archive of these entries."""
    file = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return file.getvalue()


def mutate_legacy(data: bytes, rng: random.Random, canary: str) -> bytes:
    """Change one of the five pickles before the storages, or their bytes."""
    parts, at = [], 0
    for _ in range(5):
        end = at
        for _, _, place in pickletools.genops(io.BytesIO(data[at:])):
            end = at + (place or 0) + 1
        parts.append(data[at:end])
        at = end
    kind = rng.randrange(10)
    if kind < 6:
        parts[3] = mutate_pickle(parts[3], rng, canary)
    elif kind < 8:
        other = rng.randrange(5)
        parts[other] = mutate_pickle(parts[other], rng, canary)
    rest = mutate_bytes(data[at:], rng) if kind == 8 else data[at:]
    whole = b"".join(parts) + rest
    return mutate_bytes(whole, rng) if kind == 9 else whole


# ── JSON and YAML ──


def mutate_value(value: Any, rng: random.Random) -> Any:
    """Change one value somewhere in a tree of JSON."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice([*value])
        changed = dict(value)
        match rng.randrange(8):
            case 0:
                del changed[key]
            case 1:
                changed[rng.choice(TEXTS)] = changed.pop(key)
            case 2:
                changed[rng.choice(TEXTS)] = rng.choice(VALUES)
            case _:
                changed[key] = mutate_value(changed[key], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        changed_list = list(value)
        match rng.randrange(6):
            case 0:
                del changed_list[at]
            case 1:
                times = rng.choice((2, 50, 3000))
                changed_list *= times if times * len(changed_list) <= 10_000 else 1
            case _:
                changed_list[at] = mutate_value(changed_list[at], rng)
        return changed_list
    if rng.random() < 0.1:
        for _ in range(rng.choice((3, 20, 1500))):
            value = [value]
        return value
    return rng.choice(VALUES)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Change a value of a JSON text, or its bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(data, rng)
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        value = mutate_value(value, rng)
    return _to_json(value).encode(errors="surrogatepass")


def _to_json(value: Any) -> str:
    """Return the text of a tree, cut if it is long: it may have copies of copies."""
    parts, length = [], 0
    try:
        for part in json.JSONEncoder().iterencode(value):
            parts.append(part)
            length += len(part)
            if length > MAX_TEXT:
                break
    except (RecursionError, ValueError):
        return "[" * 5000
    return "".join(parts)


_YAML_LINES = (
    "models: *a",
    "&a [*a, *a]",
    "models: !!python/object/apply:os.system [id]",
    "- - - -",
)
_YAML_LINES += ("? [a]: b", "models: [[[[[[[[[[[[x]]]]]]]]]]]]", "weights: .nan", "segment: .inf")
_YAML_LINES += (
    "segment: 1_0:30",
    "models: 2020-01-01",
    "<<: [a]",
    "%YAML 9.9",
    "---",
    "\t",
    "{" * 200,
)
_YAML_LINES += ("models: " + str(["x"] * 3000), "a: &x [1]\nb: [" + "*x," * 3000 + "]")


def mutate_yaml(data: bytes, rng: random.Random) -> bytes:
    """Change the lines of a YAML text, its values, or its bytes."""
    kind = rng.random()
    if kind < 0.3:
        return mutate_bytes(data, rng)
    if kind < 0.6:
        return mutate_json(json.dumps(_as_tree(data)).encode(), rng)
    lines = data.decode().splitlines()
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(lines) + 1)
        lines[at : at + rng.randrange(2)] = [rng.choice(_YAML_LINES)]
    return "\n".join(lines).encode()


def _as_tree(data: bytes) -> Any:
    import yaml

    return yaml.safe_load(data)


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Change the JSON header, the JSON in its metadata, the length, or the bytes."""
    (length,) = struct.unpack_from("<Q", data)
    if rng.random() < 0.2:
        return mutate_bytes(data, rng)
    header = json.loads(data[8 : 8 + length])
    metadata = header.get("__metadata__", {})
    nested = [key for key in ("kwargs", "args", "structure") if key in metadata]
    if nested and rng.random() < 0.5:
        key = rng.choice(nested)
        metadata[key] = mutate_json(metadata[key].encode(), rng).decode(errors="replace")
    else:
        header = mutate_value(header, rng)
    text = _to_json(header).encode(errors="surrogatepass")
    stated = len(text) if rng.random() < 0.95 else rng.choice(NUMBERS) % 2**64
    return struct.pack("<Q", stated) + text + data[8 + length :]


def choose(rng: random.Random, seeds: Sequence[Any]) -> Any:
    """Return one of the seeds."""
    return seeds[rng.randrange(len(seeds))]
