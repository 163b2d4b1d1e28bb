"""Checkpoint files made to do harm: each name in `FILES` writes one, none may ever succeed.

`canary` is a path that does not exist; a file that gets anything executed creates it.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import pickle
import struct
import subprocess
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from demucs_infer.demucs import Demucs

SMALL = {"sources": ["a", "b"], "channels": 4, "depth": 2, "lstm_layers": 0}


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.parts = (function, arguments, state) if state is not None else (function, arguments)

    def __reduce__(self) -> Any:
        return self.parts


class Named:
    """Pickles as a name, whatever it is the name of."""

    def __init__(self, module: str, name: str) -> None:
        self.text = f"{module}\n{name}\n"

    def __call__(self) -> None:
        """Pickle wants to see something callable where a call is written."""


class Raw(bytes):
    """Opcodes that leave one value on the stack, to stand where that value would."""


class _Pickler(pickle._Pickler):  # type: ignore[name-defined]
    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, Named):
            self.write(b"c" + obj.text.encode())
        elif isinstance(obj, Raw):
            self.write(bytes(obj))
        else:
            super().save(obj, save_persistent_id)


def dumps(content: Any, protocol: int = 2) -> bytes:
    file = io.BytesIO()
    _Pickler(file, protocol=protocol).dump(content)
    return file.getvalue()


def archive(program: bytes) -> bytes:
    """A file as torch.save writes one, around any pickle, with 64 numbers as its storage."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as out:
        out.writestr("archive/data.pkl", program)
        out.writestr("archive/data/0", bytes(256))
    return file.getvalue()


def package(**parts: Any) -> bytes:
    """A package of a small Demucs, with some part of it replaced."""
    klass, state = Named("demucs.demucs", "Demucs"), {"w": view(64, 0, (4,), (1,))}
    whole = {"klass": klass, "args": (), "kwargs": SMALL, "state": state, "training_args": None}
    return archive(dumps({**whole, **parts}))


def small(**kwargs: Any) -> bytes:
    """A package of a Demucs with these arguments."""
    return package(kwargs={**SMALL, **kwargs})


def weight(storage: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    """A package with one weight, described as said, in a file with 64 numbers."""
    return package(state={"w": view(storage, offset, shape, strides)})


def view(storage: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Raw:
    """A tensor as torch pickles one."""
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    place = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu"
    size = dumps(storage)[2:-1]
    parts = b"".join(dumps(part, 1)[:-1] for part in (offset, shape, strides))
    return Raw(rebuild + b"(" + place + size + b"tQ" + parts + b"\x89}tR")


def opcodes(program: bytes) -> bytes:
    """A package with these opcodes' value among its arguments."""
    return package(kwargs={"x": Raw(program)})


def safetensors(metadata: dict[str, str], header: dict[str, Any] | None = None) -> bytes:
    if header is None:
        header = {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
        return safetensors(metadata, header) + bytes(16)
    text = json.dumps({"__metadata__": metadata, **header}).encode()
    return struct.pack("<Q", len(text)) + text


def described(klass: str, **kwargs: Any) -> dict[str, str]:
    return {"klass": klass, "args": "[]", "kwargs": json.dumps({**SMALL, **kwargs})}


def shared_storage() -> bytes:
    """A network whose many weights are all the same few bytes of the file."""
    arguments = {**SMALL, "channels": 64, "depth": 5}
    state = Demucs(**arguments).state_dict()
    one = torch.zeros(max(weight.numel() for weight in state.values()))
    state = {name: one[: old.numel()].view(old.shape) for name, old in state.items()}
    file = io.BytesIO()
    torch.save({"klass": Demucs, "args": (), "kwargs": arguments, "state": state}, file)
    return file.getvalue()


def bomb() -> bytes:
    """A compressed archive: a thousand times larger when unpacked."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as out:
        out.writestr("archive/data.pkl", dumps({}))
        with out.open("archive/data/0", "w") as entry:
            for _ in range(16):
                entry.write(bytes(2**24))
    return file.getvalue()


def directory_line(**fields: int) -> bytes:
    """An archive whose directory says something else of its first entry than is there."""
    content = bytearray(archive(dumps({})))
    at = content.index(b"PK\x01\x02")
    for name, value in fields.items():
        offset, kind = {"method": (10, "<H"), "packed": (20, "<L"), "size": (24, "<L")}[name]
        struct.pack_into(kind, content, at + offset, value)
    return bytes(content)


def nested(depth: int) -> bytes:
    """One tuple in another, so often; made by opcodes, as pickle itself would give up."""
    return b")" + b"\x85" * depth


def laughs() -> bytes:
    """Lists of ten times the list before: 10 ** 12 values, if one were to walk them."""
    program = b"]q\x40"
    for level in range(0x40, 0x40 + 12):
        program += b"0](" + bytes([ord("h"), level]) * 10 + bytes([ord("e"), ord("q"), level + 1])
    return program


def legacy(content: Any) -> bytes:
    magic = 0x1950A86A20F9469CFC6C
    parts = (magic, 1001, {"little_endian": True}, content, [])
    return b"".join(dumps(part) for part in parts)


def quantized(klass: Named, bits: int = 8) -> bytes:
    meta = {"klass": klass, "init_kwargs": {"group_size": 8, "bits": bits}, "packed": True}
    return package(state={"__quantized": True, "meta": meta, "others": [], "quantized": []})


def directory(**wrong: int) -> bytes:
    """An archive whose directory says something else than what is there."""
    data = bytearray(package())
    at = data.rfind(b"PK\x05\x06")
    for field, value in wrong.items():
        struct.pack_into("<L", data, at + {"size": 12, "start": 16}[field], value)
    return bytes(data)


def zip64_locator(offset: int) -> bytes:
    """Write an archive whose 64-bit end record is said to be at `offset`."""
    data = archive(dumps({}))
    at = data.rfind(b"PK\x05\x06")
    end = bytearray(data[at:])
    struct.pack_into("<L", end, 12, 0xFFFFFFFF)
    return data[:at] + struct.pack("<4sLQL", b"PK\x06\x07", 0, offset, 1) + bytes(end)


def zip64_entry(start: int) -> bytes:
    """Write an archive whose first entry is said to begin at `start`, by its 64-bit field."""
    data = bytearray(archive(dumps({})))
    entry = data.index(b"PK\x01\x02")
    (name_length,) = struct.unpack_from("<H", data, entry + 28)
    extra = struct.pack("<2HQ", 1, 8, start)
    struct.pack_into("<H", data, entry + 30, len(extra))
    struct.pack_into("<L", data, entry + 42, 0xFFFFFFFF)
    at = entry + 46 + name_length
    data[at:at] = extra
    end = data.rfind(b"PK\x05\x06")
    (size,) = struct.unpack_from("<L", data, end + 12)
    struct.pack_into("<L", data, end + 12, size + len(extra))
    return bytes(data)


def persistent(*parts: Any) -> Raw:
    """Return a persistent object with these parts as its identity."""
    return Raw(b"(" + b"".join(dumps(part)[2:-1] for part in parts) + b"tQ")


HUGE = 2**40

FILES: dict[str, Callable[[Path], bytes]] = {
    # Calls, at each place that a pickle can have one.
    "call.th": lambda c: archive(dumps(Calls(os.system, f"touch {c}"))),
    "call_bare.th": lambda c: pickle.dumps(Calls(os.system, f"touch {c}")),
    "call_legacy.th": lambda c: legacy(Calls(os.system, f"touch {c}")),
    "call_module.th": lambda c: legacy(
        {"klass": persistent("module", Calls(os.system, f"touch {c}"), "x.py", ""), "state": {}}
    ),
    "call_module_source.th": lambda c: legacy(
        persistent("module", Named("demucs.demucs", "Demucs"), "", Calls(os.system, f"touch {c}"))
    ),
    "module_text.th": lambda c: legacy(persistent("module", "demucs.demucs.Demucs", "x.py", "")),
    "module_short.th": lambda c: legacy(persistent("module")),
    "persistent_other.th": lambda c: legacy(persistent("posix.system", "x", "x.py", "")),
    "call_klass.th": lambda c: package(klass=Calls(os.system, f"touch {c}")),
    "call_args.th": lambda c: package(args=(Calls(os.system, f"touch {c}"),)),
    "call_kwargs.th": lambda c: package(kwargs={"x": Calls(os.system, f"touch {c}")}),
    "call_nested.th": lambda c: package(kwargs={"x": [{"y": (Calls(os.system, f"touch {c}"),)}]}),
    "call_state.th": lambda c: package(state=Calls(os.system, f"touch {c}")),
    "call_weight.th": lambda c: package(state={"w": Calls(os.system, f"touch {c}")}),
    "call_key.th": lambda c: package(state={Calls(os.system, f"touch {c}"): 1}),
    "call_eval.th": lambda c: package(klass=Calls(builtins.eval, f"open({str(c)!r}, 'w')")),
    "call_popen.th": lambda c: package(args=(Calls(subprocess.Popen, ["touch", str(c)]),)),
    "call_torch.th": lambda c: package(kwargs={"x": Calls(torch.load, str(c))}),
    "call_getattr.th": lambda c: package(
        kwargs={"x": Calls(getattr, Named("os", "path"), "exists")}
    ),
    "call_setstate.th": lambda c: package(
        kwargs={"x": Calls(dict, state=Calls(os.system, f"touch {c}"))}
    ),
    "call_inst.th": lambda c: opcodes(b"(V" + f"touch {c}".encode() + b"\nios\nsystem\n"),
    "call_obj.th": lambda c: opcodes(b"(cos\nsystem\nV" + f"touch {c}".encode() + b"\no"),
    "call_extension.th": lambda c: opcodes(b"\x82\x01"),
    "call_network.th": lambda c: package(klass=Calls(Named("demucs.demucs", "Demucs"), [])),
    # Names where a network is expected.
    "klass_system.th": lambda c: package(klass=Named("os", "system"), args=(f"touch {c}",)),
    "klass_ours.th": lambda c: package(klass=Named("demucs_infer.states", "load_model")),
    "klass_base.th": lambda c: package(klass=Named("torch.nn", "Linear"), args=(2, 2), kwargs={}),
    "klass_text.th": lambda c: package(klass="demucs.demucs.Demucs"),
    "klass.safetensors": lambda c: safetensors(
        {"klass": "subprocess.Popen", "args": json.dumps([["touch", str(c)]]), "kwargs": "{}"}
    ),
    "klass_print.safetensors": lambda c: safetensors(described("builtins.print")),
    "klass_path.safetensors": lambda c: safetensors(described("demucs.demucs.os.Demucs")),
    "class.safetensors": lambda c: safetensors(
        {
            **described("demucs.demucs.Demucs"),
            "structure": json.dumps(
                {"_dict": [["__quantized", True], ["meta", {"_class": "os.system"}]]}
            ),
        }
    ),
    # Sizes that would take all memory there is.
    "bomb.th": lambda c: bomb(),
    "method.th": lambda c: directory_line(method=8),
    "unpacked.th": lambda c: directory_line(size=HUGE % 2**31),
    "outside.th": lambda c: directory_line(packed=2**31, size=2**31),
    "zip64_locator.th": lambda c: zip64_locator(2**64 - 1),
    "zip64_locator_signed.th": lambda c: zip64_locator(2**63),
    "zip64_locator_outside.th": lambda c: zip64_locator(2**40),
    "zip64_entry.th": lambda c: zip64_entry(2**64 - 1),
    "storage.th": lambda c: weight(HUGE, 0, (4,), (1,)),
    "storage_negative.th": lambda c: weight(-5, 0, (4,), (1,)),
    "shape.th": lambda c: weight(64, 0, (HUGE, HUGE), (0, 0)),
    "shape_negative.th": lambda c: weight(64, 0, (-4, -4), (1, 1)),
    "stride.th": lambda c: weight(64, 0, (8, 8), (HUGE, 1)),
    "stride_negative.th": lambda c: weight(64, 8, (8,), (-1,)),
    "offset.th": lambda c: weight(64, HUGE, (4,), (1,)),
    "dimensions.th": lambda c: weight(64, 0, (1,) * 5000, (1,) * 5000),
    "channels.th": lambda c: small(channels=10**9),
    "wide.th": lambda c: small(channels=10**6),
    "depth.th": lambda c: small(depth=10**6),
    "growth.th": lambda c: small(growth=1e300),
    "sources.th": lambda c: small(sources=["a"] * 10**5),
    "numbers.th": lambda c: small(channels=1 << 100_000),
    "fraction.th": lambda c: small(segment=Calls(Fraction, "1e999999999")),
    "shared.th": lambda c: shared_storage(),
    "channels.safetensors": lambda c: safetensors(
        described("demucs.demucs.Demucs", channels=10**9),
        {"w": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}},
    ),
    "shape.safetensors": lambda c: safetensors(
        described("demucs.demucs.Demucs"),
        {"w": {"dtype": "F32", "shape": [HUGE, HUGE], "data_offsets": [0, 4 * HUGE * HUGE]}},
    ),
    "overlap.safetensors": lambda c: (
        safetensors(
            described("demucs.demucs.Demucs"),
            {k: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for k in "abc"},
        )
        + bytes(16)
    ),
    "header.safetensors": lambda c: struct.pack("<Q", 2**60) + b"{}",
    "deep.safetensors": lambda c: struct.pack("<Q", 200_000) + b"[" * 200_000,
    "deep_kwargs.safetensors": lambda c: safetensors(
        {"klass": "demucs.demucs.Demucs", "args": "[" * 200_000, "kwargs": "{}"}
    ),
    "zero.safetensors": lambda c: safetensors(
        described(
            "demucs.demucs.Demucs", segment={"_type": "fraction", "numerator": 1, "denominator": 0}
        )
    ),
    # Pickles that wear the reader out.
    "memo.th": lambda c: opcodes(b"Nr\xff\xff\xff\x7f"),
    "bytes.th": lambda c: opcodes(b"\x96" + struct.pack("<Q", HUGE)),
    "text.th": lambda c: opcodes(b"\x8d" + struct.pack("<Q", HUGE)),
    "nested.th": lambda c: opcodes(nested(200_000)),
    "laughs_shape.th": lambda c: weight(64, 0, (Raw(laughs() + b"\x85"),), (1,)),
    "nested_known.th": lambda c: package(kwargs={**SMALL, "context": Raw(nested(3000))}),
    "nested_json.safetensors": lambda c: safetensors(
        {**described("demucs.demucs.Demucs"), "kwargs": '{"a":[' * 300 + "1" + "]}" * 300}
    ),
    "nested_key.th": lambda c: opcodes(b"}" + nested(200_000) + b"Ns"),
    "laughs.th": lambda c: opcodes(laughs()),
    "cycle.th": lambda c: opcodes(b"]q\x00h\x00a"),
    "steps.th": lambda c: opcodes(b"" + b"N0" * 2_000_000 + b"N"),
    "stack.th": lambda c: opcodes(b"" + b"\x8f" * 1_000_000),
    "underflow.th": lambda c: archive(b"\x80\x02000R."),
    "endless.th": lambda c: archive(b"\x80\x02N"),
    # Files that are not what their names say.
    "empty.th": lambda c: b"",
    "empty.safetensors": lambda c: b"",
    "text_file.th": lambda c: b"<html>404 Not Found</html>",
    "cut.th": lambda c: package(state={})[:-30],
    "directory_size.th": lambda c: directory(size=2**31),
    "directory_start.th": lambda c: directory(start=7),
    "script.th": lambda c: archive(dumps({})).replace(b"data.pkl", b"code.pkl"),
    "legacy_cut.th": lambda c: legacy({"klass": 1})[:-3],
    "quantizer.th": lambda c: quantized(Named("os", "system")),
    "quantizer_bits.th": lambda c: quantized(Named("diffq.uniform", "UniformQuantizer"), 10**9),
    "list.th": lambda c: archive(dumps([1, 2, 3])),
    "number.th": lambda c: archive(dumps(3)),
    "no_weights.th": lambda c: package(),
}


def write(folder: Path, canary: Path) -> list[Path]:
    """All of them, in `folder`."""
    for name, content in FILES.items():
        (folder / name).write_bytes(content(canary))
    return [folder / name for name in FILES]
