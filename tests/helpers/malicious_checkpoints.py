"""Malicious checkpoint files: each entry of `FILES` makes one, and loading it must fail.

`canary` is a path that does not exist: a file that gets code executed creates it.
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


class Call:
    """An object that is pickled as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.parts = (function, arguments, state) if state is not None else (function, arguments)

    def __reduce__(self) -> Any:
        return self.parts


class GlobalName:
    """An object that is pickled as a global name."""

    def __init__(self, module: str, name: str) -> None:
        self.text = f"{module}\n{name}\n"

    def __call__(self) -> None:
        """Do nothing: pickle requires a callable as the function of a call."""


class Opcodes(bytes):
    """Opcodes that push one value, used in place of that value."""


class _Pickler(pickle._Pickler):  # type: ignore[name-defined]
    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, GlobalName):
            self.write(b"c" + obj.text.encode())
        elif isinstance(obj, Opcodes):
            self.write(bytes(obj))
        else:
            super().save(obj, save_persistent_id)


def dumps(content: Any, protocol: int = 2) -> bytes:
    file = io.BytesIO()
    _Pickler(file, protocol=protocol).dump(content)
    return file.getvalue()


def make_archive(program: bytes) -> bytes:
    """Return a file like those of torch.save, with this pickle and a storage of 64 numbers."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as out:
        out.writestr("archive/data.pkl", program)
        out.writestr("archive/data/0", bytes(256))
    return file.getvalue()


def make_package(**parts: Any) -> bytes:
    """Return a package of a small Demucs with some parts replaced."""
    klass, state = GlobalName("demucs.demucs", "Demucs"), {"w": tensor_opcodes(64, 0, (4,), (1,))}
    whole = {"klass": klass, "args": (), "kwargs": SMALL, "state": state, "training_args": None}
    return make_archive(dumps({**whole, **parts}))


def make_demucs(**kwargs: Any) -> bytes:
    """Return a package of a Demucs with these arguments."""
    return make_package(kwargs={**SMALL, **kwargs})


def make_weight(
    storage: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> bytes:
    """Return a package with one weight, in a file with 64 numbers."""
    return make_package(state={"w": tensor_opcodes(storage, offset, shape, strides)})


def tensor_opcodes(
    storage: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> Opcodes:
    """Return the opcodes of a tensor, as torch writes them."""
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    place = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu"
    size = dumps(storage)[2:-1]
    parts = b"".join(dumps(part, 1)[:-1] for part in (offset, shape, strides))
    return Opcodes(rebuild + b"(" + place + size + b"tQ" + parts + b"\x89}tR")


def package_with_opcodes(program: bytes) -> bytes:
    """Return a package with the value of these opcodes among its arguments."""
    return make_package(kwargs={"x": Opcodes(program)})


def make_safetensors(metadata: dict[str, str], header: dict[str, Any] | None = None) -> bytes:
    if header is None:
        header = {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
        return make_safetensors(metadata, header) + bytes(16)
    text = json.dumps({"__metadata__": metadata, **header}).encode()
    return struct.pack("<Q", len(text)) + text


def describe_network(klass: str, **kwargs: Any) -> dict[str, str]:
    return {"klass": klass, "args": "[]", "kwargs": json.dumps({**SMALL, **kwargs})}


def make_shared_storage() -> bytes:
    """Return a package whose weights all use the same bytes."""
    arguments = {**SMALL, "channels": 64, "depth": 5}
    state = Demucs(**arguments).state_dict()
    one = torch.zeros(max(make_weight.numel() for make_weight in state.values()))
    state = {name: one[: old.numel()].view(old.shape) for name, old in state.items()}
    file = io.BytesIO()
    torch.save({"klass": Demucs, "args": (), "kwargs": arguments, "state": state}, file)
    return file.getvalue()


def make_zip_bomb() -> bytes:
    """Return a compressed archive that is a thousand times larger when unpacked."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as out:
        out.writestr("archive/data.pkl", dumps({}))
        with out.open("archive/data/0", "w") as entry:
            for _ in range(16):
                entry.write(bytes(2**24))
    return file.getvalue()


def forge_directory_entry(**fields: int) -> bytes:
    """Return an archive whose directory has wrong fields for its first entry."""
    content = bytearray(make_archive(dumps({})))
    at = content.index(b"PK\x01\x02")
    for name, value in fields.items():
        offset, kind = {"method": (10, "<H"), "packed": (20, "<L"), "size": (24, "<L")}[name]
        struct.pack_into(kind, content, at + offset, value)
    return bytes(content)


def nest_tuples(depth: int) -> bytes:
    """Return opcodes of nested tuples, deeper than pickle can write."""
    return b")" + b"\x85" * depth


def nest_lists() -> bytes:
    """Return opcodes of lists of ten times the previous list: 10 ** 12 values in total."""
    program = b"]q\x40"
    for level in range(0x40, 0x40 + 12):
        program += b"0](" + bytes([ord("h"), level]) * 10 + bytes([ord("e"), ord("q"), level + 1])
    return program


def make_legacy(content: Any) -> bytes:
    magic = 0x1950A86A20F9469CFC6C
    parts = (magic, 1001, {"little_endian": True}, content, [])
    return b"".join(dumps(part) for part in parts)


def make_quantized(klass: GlobalName, bits: int = 8) -> bytes:
    meta = {"klass": klass, "init_kwargs": {"group_size": 8, "bits": bits}, "packed": True}
    return make_package(state={"__quantized": True, "meta": meta, "others": [], "quantized": []})


def forge_directory(**wrong: int) -> bytes:
    """Return an archive whose end record has wrong fields."""
    data = bytearray(make_package())
    at = data.rfind(b"PK\x05\x06")
    for field, value in wrong.items():
        struct.pack_into("<L", data, at + {"size": 12, "start": 16}[field], value)
    return bytes(data)


def forge_zip64_locator(offset: int) -> bytes:
    """Return an archive whose 64-bit end record is declared at `offset`."""
    data = make_archive(dumps({}))
    at = data.rfind(b"PK\x05\x06")
    end = bytearray(data[at:])
    struct.pack_into("<L", end, 12, 0xFFFFFFFF)
    return data[:at] + struct.pack("<4sLQL", b"PK\x06\x07", 0, offset, 1) + bytes(end)


def forge_zip64_entry(start: int) -> bytes:
    """Return an archive whose first entry is declared at `start` in its 64-bit field."""
    data = bytearray(make_archive(dumps({})))
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


def persistent_opcodes(*parts: Any) -> Opcodes:
    """Return the opcodes of a persistent object with these parts as its identity."""
    return Opcodes(b"(" + b"".join(dumps(part)[2:-1] for part in parts) + b"tQ")


HUGE = 2**40

FILES: dict[str, Callable[[Path], bytes]] = {
    # Calls, at each place that a pickle can have one.
    "call.th": lambda c: make_archive(dumps(Call(os.system, f"touch {c}"))),
    "call_bare.th": lambda c: pickle.dumps(Call(os.system, f"touch {c}")),
    "call_legacy.th": lambda c: make_legacy(Call(os.system, f"touch {c}")),
    "call_module.th": lambda c: make_legacy(
        {
            "klass": persistent_opcodes("module", Call(os.system, f"touch {c}"), "x.py", ""),
            "state": {},
        }
    ),
    "call_module_source.th": lambda c: make_legacy(
        persistent_opcodes(
            "module", GlobalName("demucs.demucs", "Demucs"), "", Call(os.system, f"touch {c}")
        )
    ),
    "module_text.th": lambda c: make_legacy(
        persistent_opcodes("module", "demucs.demucs.Demucs", "x.py", "")
    ),
    "module_short.th": lambda c: make_legacy(persistent_opcodes("module")),
    "persistent_other.th": lambda c: make_legacy(
        persistent_opcodes("posix.system", "x", "x.py", "")
    ),
    "call_klass.th": lambda c: make_package(klass=Call(os.system, f"touch {c}")),
    "call_args.th": lambda c: make_package(args=(Call(os.system, f"touch {c}"),)),
    "call_kwargs.th": lambda c: make_package(kwargs={"x": Call(os.system, f"touch {c}")}),
    "call_nested.th": lambda c: make_package(
        kwargs={"x": [{"y": (Call(os.system, f"touch {c}"),)}]}
    ),
    "call_state.th": lambda c: make_package(state=Call(os.system, f"touch {c}")),
    "call_weight.th": lambda c: make_package(state={"w": Call(os.system, f"touch {c}")}),
    "call_key.th": lambda c: make_package(state={Call(os.system, f"touch {c}"): 1}),
    "call_eval.th": lambda c: make_package(klass=Call(builtins.eval, f"open({str(c)!r}, 'w')")),
    "call_popen.th": lambda c: make_package(args=(Call(subprocess.Popen, ["touch", str(c)]),)),
    "call_torch.th": lambda c: make_package(kwargs={"x": Call(torch.load, str(c))}),
    "call_getattr.th": lambda c: make_package(
        kwargs={"x": Call(getattr, GlobalName("os", "path"), "exists")}
    ),
    "call_setstate.th": lambda c: make_package(
        kwargs={"x": Call(dict, state=Call(os.system, f"touch {c}"))}
    ),
    "call_inst.th": lambda c: package_with_opcodes(
        b"(V" + f"touch {c}".encode() + b"\nios\nsystem\n"
    ),
    "call_obj.th": lambda c: package_with_opcodes(
        b"(cos\nsystem\nV" + f"touch {c}".encode() + b"\no"
    ),
    "call_extension.th": lambda c: package_with_opcodes(b"\x82\x01"),
    "call_network.th": lambda c: make_package(
        klass=Call(GlobalName("demucs.demucs", "Demucs"), [])
    ),
    # Names in place of a network.
    "klass_system.th": lambda c: make_package(
        klass=GlobalName("os", "system"), args=(f"touch {c}",)
    ),
    "klass_ours.th": lambda c: make_package(klass=GlobalName("demucs_infer.states", "load_model")),
    "klass_base.th": lambda c: make_package(
        klass=GlobalName("torch.nn", "Linear"), args=(2, 2), kwargs={}
    ),
    "klass_text.th": lambda c: make_package(klass="demucs.demucs.Demucs"),
    "klass.safetensors": lambda c: make_safetensors(
        {"klass": "subprocess.Popen", "args": json.dumps([["touch", str(c)]]), "kwargs": "{}"}
    ),
    "klass_print.safetensors": lambda c: make_safetensors(describe_network("builtins.print")),
    "klass_path.safetensors": lambda c: make_safetensors(
        describe_network("demucs.demucs.os.Demucs")
    ),
    "class.safetensors": lambda c: make_safetensors(
        {
            **describe_network("demucs.demucs.Demucs"),
            "structure": json.dumps(
                {"_dict": [["__quantized", True], ["meta", {"_class": "os.system"}]]}
            ),
        }
    ),
    # Sizes that would exhaust memory.
    "bomb.th": lambda c: make_zip_bomb(),
    "method.th": lambda c: forge_directory_entry(method=8),
    "unpacked.th": lambda c: forge_directory_entry(size=HUGE % 2**31),
    "outside.th": lambda c: forge_directory_entry(packed=2**31, size=2**31),
    "zip64_locator.th": lambda c: forge_zip64_locator(2**64 - 1),
    "zip64_locator_signed.th": lambda c: forge_zip64_locator(2**63),
    "zip64_locator_outside.th": lambda c: forge_zip64_locator(2**40),
    "zip64_entry.th": lambda c: forge_zip64_entry(2**64 - 1),
    "storage.th": lambda c: make_weight(HUGE, 0, (4,), (1,)),
    "storage_negative.th": lambda c: make_weight(-5, 0, (4,), (1,)),
    "shape.th": lambda c: make_weight(64, 0, (HUGE, HUGE), (0, 0)),
    "shape_negative.th": lambda c: make_weight(64, 0, (-4, -4), (1, 1)),
    "stride.th": lambda c: make_weight(64, 0, (8, 8), (HUGE, 1)),
    "stride_negative.th": lambda c: make_weight(64, 8, (8,), (-1,)),
    "offset.th": lambda c: make_weight(64, HUGE, (4,), (1,)),
    "dimensions.th": lambda c: make_weight(64, 0, (1,) * 5000, (1,) * 5000),
    "channels.th": lambda c: make_demucs(channels=10**9),
    "wide.th": lambda c: make_demucs(channels=10**6),
    "depth.th": lambda c: make_demucs(depth=10**6),
    "growth.th": lambda c: make_demucs(growth=1e300),
    "sources.th": lambda c: make_demucs(sources=["a"] * 10**5),
    "numbers.th": lambda c: make_demucs(channels=1 << 100_000),
    "fraction.th": lambda c: make_demucs(segment=Call(Fraction, "1e999999999")),
    "shared.th": lambda c: make_shared_storage(),
    "channels.safetensors": lambda c: make_safetensors(
        describe_network("demucs.demucs.Demucs", channels=10**9),
        {"w": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}},
    ),
    "shape.safetensors": lambda c: make_safetensors(
        describe_network("demucs.demucs.Demucs"),
        {"w": {"dtype": "F32", "shape": [HUGE, HUGE], "data_offsets": [0, 4 * HUGE * HUGE]}},
    ),
    "overlap.safetensors": lambda c: (
        make_safetensors(
            describe_network("demucs.demucs.Demucs"),
            {k: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for k in "abc"},
        )
        + bytes(16)
    ),
    "header.safetensors": lambda c: struct.pack("<Q", 2**60) + b"{}",
    "deep.safetensors": lambda c: struct.pack("<Q", 200_000) + b"[" * 200_000,
    "deep_kwargs.safetensors": lambda c: make_safetensors(
        {"klass": "demucs.demucs.Demucs", "args": "[" * 200_000, "kwargs": "{}"}
    ),
    "zero.safetensors": lambda c: make_safetensors(
        describe_network(
            "demucs.demucs.Demucs", segment={"_type": "fraction", "numerator": 1, "denominator": 0}
        )
    ),
    # Pickles that would exhaust the reader.
    "memo.th": lambda c: package_with_opcodes(b"Nr\xff\xff\xff\x7f"),
    "bytes.th": lambda c: package_with_opcodes(b"\x96" + struct.pack("<Q", HUGE)),
    "text.th": lambda c: package_with_opcodes(b"\x8d" + struct.pack("<Q", HUGE)),
    "nested.th": lambda c: package_with_opcodes(nest_tuples(200_000)),
    "laughs_shape.th": lambda c: make_weight(64, 0, (Opcodes(nest_lists() + b"\x85"),), (1,)),
    "nested_known.th": lambda c: make_package(
        kwargs={**SMALL, "context": Opcodes(nest_tuples(3000))}
    ),
    "nested_json.safetensors": lambda c: make_safetensors(
        {**describe_network("demucs.demucs.Demucs"), "kwargs": '{"a":[' * 300 + "1" + "]}" * 300}
    ),
    "nested_key.th": lambda c: package_with_opcodes(b"}" + nest_tuples(200_000) + b"Ns"),
    "laughs.th": lambda c: package_with_opcodes(nest_lists()),
    "cycle.th": lambda c: package_with_opcodes(b"]q\x00h\x00a"),
    "steps.th": lambda c: package_with_opcodes(b"" + b"N0" * 2_000_000 + b"N"),
    "stack.th": lambda c: package_with_opcodes(b"" + b"\x8f" * 1_000_000),
    "underflow.th": lambda c: make_archive(b"\x80\x02000R."),
    "endless.th": lambda c: make_archive(b"\x80\x02N"),
    # Files of another type than their suffix.
    "empty.th": lambda c: b"",
    "empty.safetensors": lambda c: b"",
    "text_file.th": lambda c: b"<html>404 Not Found</html>",
    "cut.th": lambda c: make_package(state={})[:-30],
    "directory_size.th": lambda c: forge_directory(size=2**31),
    "directory_start.th": lambda c: forge_directory(start=7),
    "script.th": lambda c: make_archive(dumps({})).replace(b"data.pkl", b"code.pkl"),
    "legacy_cut.th": lambda c: make_legacy({"klass": 1})[:-3],
    "quantizer.th": lambda c: make_quantized(GlobalName("os", "system")),
    "quantizer_bits.th": lambda c: make_quantized(
        GlobalName("diffq.uniform", "UniformQuantizer"), 10**9
    ),
    "list.th": lambda c: make_archive(dumps([1, 2, 3])),
    "number.th": lambda c: make_archive(dumps(3)),
    "no_weights.th": lambda c: make_package(),
}


def write_files(folder: Path, canary: Path) -> list[Path]:
    """Write all files to `folder`, and return their paths."""
    for name, content in FILES.items():
        (folder / name).write_bytes(content(canary))
    return [folder / name for name in FILES]
