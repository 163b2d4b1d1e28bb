"""Read a `.th`, `.pt` or `.ckpt` file as data: a pickle is a program, and this never runs one.

The opcodes are only taken apart (`pickletools.genops`) and a stack of plain values is kept. A name
in the file becomes a `Placeholder`, an object that does nothing; a handful of names that torch
itself writes (tensors, ordered dictionaries, fractions) are understood, all others stay inert
whatever the file asks to do with them.
"""

from __future__ import annotations

import io
import mmap
import pickletools
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch

from demucs_infer.checkpoints.lazy_tensor import LazyTensor, Storage, short_repr
from demucs_infer.checkpoints.zip_index import entries, is_zip
from demucs_infer.errors import CheckpointError

MAX_OPCODES = 300_000
"""A Demucs package has about fifteen thousand; one with an optimizer's state a few times that."""

MAX_PICKLE_BYTES = 64 * 2**20

FindStorage = Callable[[str, torch.dtype, int], Storage]


@dataclass(frozen=True, slots=True, eq=False)
class Placeholder:
    """Something that a file names (`posix.system`) or asks for: a label, never the thing."""

    name: str
    is_call: bool = False


def read_torch_file(path: Path) -> object:
    """What `torch.save` wrote: containers, numbers, strings, `LazyTensor` and `Placeholder`."""
    data = map_file(path)
    if is_zip(data):
        return _read_zip(data)
    if bytes(data[:1]) == b"\x80":
        return _read_legacy(data)
    raise CheckpointError("it is neither a zip archive nor a pickle, so torch did not write it")


def map_file(path: Path) -> memoryview:
    """The bytes of a file, mapped: they become memory only where they are looked at."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            raise CheckpointError("the file is empty")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _read_zip(data: memoryview) -> object:
    members = entries(data)
    root = next(iter(members)).split("/")[0]
    if f"{root}/data.pkl" not in members or f"{root}/constants.pkl" in members:
        raise CheckpointError("the archive is not what torch.save writes (TorchScript is not read)")
    if bytes(members.get(f"{root}/byteorder", memoryview(b"little"))) != b"little":
        raise CheckpointError("the weights are big-endian; save them again on a common machine")
    program = members[f"{root}/data.pkl"]
    if len(program) > MAX_PICKLE_BYTES:
        raise CheckpointError(f"its data.pkl is {len(program)} bytes, far more than any network")

    def find(key: str, dtype: torch.dtype, numel: int) -> Storage:
        storage = Storage(dtype, numel)
        storage.locate(members.get(f"{root}/data/{key}", memoryview(b"")))
        return storage

    return _Machine(find).run(io.BytesIO(program))


_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def _read_legacy(data: memoryview) -> object:
    """The format before torch 1.6: five pickles in a row, then the storages one by one."""
    storages: dict[str, Storage] = {}

    def find(key: str, dtype: torch.dtype, numel: int) -> Storage:
        return storages.setdefault(key, Storage(dtype, numel))

    file = _Window(data)
    if _Machine(find).run(file) != _LEGACY_MAGIC:
        raise CheckpointError("it is a bare pickle, which torch.save does not write")
    _Machine(find).run(file)  # the version of the format
    _Machine(find).run(file)  # the machine that wrote it
    value = _Machine(find).run(file)
    keys = _Machine(find).run(file)
    if not isinstance(keys, list) or len(keys) > len(data) // 8:
        raise CheckpointError("the list of its storages is damaged")
    at = file.tell()
    for key in keys:
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None or at + 8 > len(data):
            raise CheckpointError("the list of its storages does not match its tensors")
        storage.locate(data[at + 8 :])
        at += 8 + storage.numel * storage.dtype.itemsize
    if any(len(found.data) == 0 < found.numel for found in storages.values()):
        raise CheckpointError("weights that its tensors mention are missing")
    return value


class _Window(io.BytesIO):
    """A mapped file as `pickletools` reads one; asking for more than there is costs nothing."""

    def __init__(self, data: memoryview) -> None:
        super().__init__()
        self._data = data
        self._at = 0

    def read(self, size: int | None = -1) -> bytes:
        stop = (
            len(self._data) if size is None or size < 0 else min(self._at + size, len(self._data))
        )
        found = bytes(self._data[self._at : min(stop, self._at + MAX_PICKLE_BYTES)])
        self._at += len(found)
        return found

    def readline(self, _: int | None = -1) -> bytes:
        found = bytes(self._data[self._at : self._at + 4096])
        line = found[: found.find(b"\n") + 1]
        self._at += len(line)
        return line

    def tell(self) -> int:
        return self._at


_STORAGES = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}


class _Machine:
    """The stack machine that a pickle describes, with nothing behind it that could act."""

    def __init__(self, find_storage: FindStorage) -> None:
        self._find_storage = find_storage
        self._storages: dict[str, Storage] = {}
        self._stack: list[object] = []
        self._marks: list[list[object]] = []
        self._memo: dict[int, object] = {}
        self._budget = MAX_OPCODES

    def run(self, program: io.BytesIO) -> object:
        """The value that one pickle describes; `program` is left after its end."""
        try:
            for opcode, argument, _ in pickletools.genops(program):
                self._spend(1)
                if opcode.name == "STOP":
                    return self._stack.pop()
                self._step(opcode.name, argument)
        except (ValueError, IndexError, KeyError, ArithmeticError, struct.error) as error:
            raise CheckpointError(f"its pickle is damaged ({short_repr(error)})") from error
        raise CheckpointError("its pickle has no end")

    def _spend(self, amount: int) -> None:
        self._budget -= amount
        if self._budget < 0:
            raise CheckpointError(f"its pickle has more than {MAX_OPCODES} steps")

    def _step(self, name: str, argument: object) -> None:
        if name in _LITERALS:
            self._push(argument)
        elif name in _CONSTANTS:
            self._push(_CONSTANTS[name]())
        elif name in _STEPS:
            _STEPS[name](self, argument)
        elif name not in ("PROTO", "FRAME"):
            raise CheckpointError(f"its pickle uses {name}, which torch.save never writes")

    # What the opcodes do, in the order of pickletools' own list.

    def _mark(self, _: object) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _to_mark(self) -> list[object]:
        found, self._stack = self._stack, self._marks.pop()
        return found

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _drop(self) -> None:
        self._stack.pop()

    def _tuple(self, count: int) -> None:
        found = tuple(self._stack[-count:])
        if len(found) != count:
            raise ValueError("a tuple of more values than there are")
        del self._stack[-count:]
        self._push(found)

    def _append(self, found: list[object]) -> None:
        if isinstance(self._stack[-1], list):
            self._stack[-1].extend(found)

    def _set_items(self, found: list[object]) -> None:
        target = self._stack[-1]
        if isinstance(target, dict):
            target.update((_key(key), value) for key, value in zip(found[::2], found[1::2]))

    def _dict(self, _: object) -> None:
        found = self._to_mark()
        self._push({})
        self._set_items(found)

    def _inert(self, name: str, *, is_call: bool = False) -> None:
        self._push(Placeholder(name[:200], is_call))

    def _instance(self, name: str) -> None:
        self._to_mark()
        self._inert(name, is_call=True)

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a name that is not text")
        self._inert(f"{module}.{name}")

    def _reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._call(function, arguments)

    def _new_object_ex(self) -> None:
        del self._stack[-2:]
        self._call(self._stack.pop(), ())

    def _call(self, function: object, arguments: object) -> None:
        """The value of the few calls that torch writes; any other becomes an `Placeholder`."""
        name = function.name if isinstance(function, Placeholder) else type(function).__name__
        known = (
            _CALLS.get(name) if isinstance(function, Placeholder) and not function.is_call else None
        )
        if known is None or not isinstance(arguments, tuple):
            self._inert(name, is_call=True)
        else:
            self._spend(sum(len(part) for part in arguments if isinstance(part, list | tuple)))
            self._push(known(arguments))

    def _persistent(self, identity: object) -> None:
        """A storage: ("storage", type, key, device, numel), torch's only persistent object."""
        if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
            raise ValueError("a persistent object that is not a storage")
        _, kind, key, _, numel = identity[:5]
        dtype = _STORAGES.get(kind.name) if isinstance(kind, Placeholder) else None
        if dtype is None or not isinstance(key, str) or type(numel) is not int or numel < 0:
            raise ValueError("a storage of an unknown kind")
        if any(part is not None for part in identity[5:]):
            raise ValueError("a view of a storage, which no torch of this decade writes")
        if key not in self._storages:
            self._storages[key] = self._find_storage(key, dtype, numel)
        if (self._storages[key].dtype, self._storages[key].numel) != (dtype, numel):
            raise ValueError("one storage with two descriptions")
        self._push(self._storages[key])

    def _put(self, index: object) -> None:
        self._memo[index if isinstance(index, int) else len(self._memo)] = self._stack[-1]

    def _get(self, index: object) -> None:
        self._push(self._memo[index if isinstance(index, int) else -1])


def _key(value: object) -> object:
    """A dictionary's key, if hashing it is harmless (a deep tuple can exhaust the stack)."""
    scalar = (str, int, float, bool, bytes, Placeholder, type(None))
    parts = value if isinstance(value, tuple) else (value,)
    if len(parts) > 16 or not all(isinstance(part, scalar) for part in parts):
        raise ValueError(f"a {type(value).__name__} as the key of a dictionary")
    return value


def _ordered_dict(arguments: tuple[object, ...]) -> dict[object, object]:
    match arguments:
        case ():
            return {}
        case (list(pairs),) if all(isinstance(pair, list | tuple) for pair in pairs):
            return {_key(key): value for key, value in pairs}
    raise ValueError("an ordered dictionary of something else than pairs")


def _tensor(arguments: tuple[object, ...]) -> LazyTensor:
    match arguments:
        case (Storage() as storage, int(offset), tuple(shape), tuple(strides), *_):
            return LazyTensor(storage, offset, shape, strides)
    raise ValueError("a tensor that is not described as one")


def _first(arguments: tuple[object, ...]) -> object:
    """A parameter is its tensor; what follows in the file matters to training alone."""
    return arguments[0]


def _fraction(arguments: tuple[object, ...]) -> Fraction:
    match arguments:
        case (str(text),) if re.fullmatch(r"-?\d{1,18}(/\d{1,18})?", text):
            return Fraction(text)
        case (int(numerator), int(denominator)):
            return Fraction(numerator, denominator)
    raise ValueError("a fraction that is not two numbers")


def _size(arguments: tuple[object, ...]) -> tuple[object, ...]:
    match arguments:
        case ([*parts],):
            return tuple(parts)
    raise ValueError("a shape that is not numbers")


_CALLS: dict[
    str, Callable[[tuple[object, ...]], object]
] = {  # the only names that become something
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.Size": _size,
    "fractions.Fraction": _fraction,
}

_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
_TEXTS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_BYTES = ("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8")
_LITERALS = frozenset((*_NUMBERS, *_TEXTS, *_BYTES, "BYTEARRAY8"))

_CONSTANTS: dict[str, Callable[[], object]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": lambda: Placeholder("builtins.set", is_call=True),
}

_STEPS: dict[str, Callable[[_Machine, object], None]] = {
    "MARK": _Machine._mark,
    "POP": lambda self, _: self._drop(),
    "POP_MARK": lambda self, _: self._to_mark().clear(),
    "DUP": lambda self, _: self._push(self._stack[-1]),
    "TUPLE": lambda self, _: self._push(tuple(self._to_mark())),
    "TUPLE1": lambda self, _: self._tuple(1),
    "TUPLE2": lambda self, _: self._tuple(2),
    "TUPLE3": lambda self, _: self._tuple(3),
    "LIST": lambda self, _: self._push(self._to_mark()),
    "APPEND": lambda self, _: self._append([self._stack.pop()]),
    "APPENDS": lambda self, _: self._append(self._to_mark()),
    "DICT": _Machine._dict,
    "SETITEM": lambda self, _: self._set_items([self._stack.pop(), self._stack.pop()][::-1]),
    "SETITEMS": lambda self, _: self._set_items(self._to_mark()),
    "ADDITEMS": lambda self, _: self._to_mark().clear(),
    "FROZENSET": lambda self, _: self._instance("builtins.frozenset"),
    "GLOBAL": lambda self, name: self._inert(str(name).replace(" ", ".", 1)),
    "STACK_GLOBAL": lambda self, _: self._stack_global(),
    "INST": lambda self, name: self._instance(str(name).replace(" ", ".", 1)),
    "OBJ": lambda self, _: self._call(self._to_mark()[0], ()),
    "REDUCE": lambda self, _: self._reduce(),
    "NEWOBJ": lambda self, _: self._reduce(),
    "NEWOBJ_EX": lambda self, _: self._new_object_ex(),
    "BUILD": lambda self, _: (
        self._drop()
    ),  # `_metadata` of a state dict, or an `Placeholder`'s state
    "BINPERSID": lambda self, _: self._persistent(self._stack.pop()),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine._put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine._get),
}
