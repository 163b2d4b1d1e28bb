"""Read a `.th`, `.pt` or `.ckpt` file as data, without executing the pickle in it.

The instructions of the pickle are parsed with `pickletools.genops` and applied to a stack of plain
values. A few known calls (for tensors, ordered dictionaries and fractions) make values; every other
class or function in the file becomes a `Placeholder`.

torch's own `weights_only` reader is not used. It rejects released checkpoints whose
`training_args` contain classes of other packages, it could execute code up to torch 2.5, and it
copies all weights into memory. This reader leaves them in the file until they are needed.
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
from demucs_infer.checkpoints.mistaken_files import describe_mistaken_file
from demucs_infer.checkpoints.zip_index import is_zip, read_entries
from demucs_infer.errors import CheckpointError

MAX_OPCODES = 300_000
"""Limit for the instructions of a pickle.

A Demucs package has about 15,000, and a few times as many with the state of an optimizer.
"""

MAX_PICKLE_BYTES = 64 * 2**20

FindStorage = Callable[[str, torch.dtype, int], Storage]


@dataclass(frozen=True, slots=True, eq=False)
class Placeholder:
    """Stands for a class or function in a file (such as `posix.system`), or for a call of it."""

    name: str
    is_call: bool = False


def read_torch_file(path: Path) -> object:
    """Return the content of a file that `torch.save` wrote.

    The result consists of containers, numbers, strings, `LazyTensor`s and `Placeholder`s. Raises
    `CheckpointError` if the file is damaged or in another format.
    """
    data = map_file(path)
    if is_zip(data):
        return _read_zip(data)
    if bytes(data[:1]) == b"\x80":
        return _read_legacy(data)
    if mistake := describe_mistaken_file(bytes(data[:64])):
        raise CheckpointError(f"it is {mistake}")
    raise CheckpointError("not written by torch.save: neither a zip archive nor a pickle")


def map_file(path: Path) -> memoryview:
    """Map a file into memory; its pages are loaded when they are read."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            raise CheckpointError("the file is empty")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _read_zip(data: memoryview) -> object:
    entries = read_entries(data)
    root = next(iter(entries)).split("/")[0]
    if f"{root}/data.pkl" not in entries or f"{root}/constants.pkl" in entries:
        raise CheckpointError("unsupported zip archive: TorchScript, or not written by torch.save")
    if bytes(entries.get(f"{root}/byteorder", memoryview(b"little"))) != b"little":
        raise CheckpointError("unsupported big-endian weights: save them as little-endian")
    program = entries[f"{root}/data.pkl"]
    if len(program) > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"data.pkl is too large: {len(program)} bytes, the limit is {MAX_PICKLE_BYTES}"
        )

    def find(key: str, dtype: torch.dtype, numel: int) -> Storage:
        storage = Storage(dtype, numel)
        storage.locate(entries.get(f"{root}/data/{key}", memoryview(b"")))
        return storage

    return _Machine(find).run(io.BytesIO(program))


_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def _read_legacy(data: memoryview) -> object:
    """Read the format that torch used before 1.6: five pickles, then the data of the tensors."""
    storages: dict[str, Storage] = {}

    def find(key: str, dtype: torch.dtype, numel: int) -> Storage:
        return storages.setdefault(key, Storage(dtype, numel))

    file = _Window(data)
    if _Machine(find).run(file) != _LEGACY_MAGIC:
        raise CheckpointError("the pickle was not written by torch.save")
    _Machine(find).run(file)  # version of the format
    _Machine(find).run(file)  # byte order and type sizes of the machine that wrote it
    value = _Machine(find).run(file)
    keys = _Machine(find).run(file)
    if not isinstance(keys, list) or len(keys) > len(data) // 8:
        raise CheckpointError("damaged list of storages")
    at = file.tell()
    for key in keys:
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None or at + 8 > len(data):
            raise CheckpointError("the list of storages does not match the tensors")
        storage.locate(data[at + 8 :])
        at += 8 + storage.numel * storage.dtype.itemsize
    if any(len(storage.data) == 0 < storage.numel for storage in storages.values()):
        raise CheckpointError("the data of some tensors is missing")
    return value


class _Window(io.BytesIO):
    """Reads a mapped file for `pickletools`, and never allocates more memory than it has bytes."""

    def __init__(self, data: memoryview) -> None:
        super().__init__()
        self._data = data
        self._at = 0

    def read(self, size: int | None = -1) -> bytes:
        stop = (
            len(self._data) if size is None or size < 0 else min(self._at + size, len(self._data))
        )
        block = bytes(self._data[self._at : min(stop, self._at + MAX_PICKLE_BYTES)])
        self._at += len(block)
        return block

    def readline(self, _: int | None = -1) -> bytes:
        block = bytes(self._data[self._at : self._at + 4096])
        line = block[: block.find(b"\n") + 1]
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
    """Executes the instructions of a pickle on plain values and placeholders only."""

    def __init__(self, find_storage: FindStorage) -> None:
        self._find_storage = find_storage
        self._storages: dict[str, Storage] = {}
        self._stack: list[object] = []
        self._marks: list[list[object]] = []
        self._memo: dict[int, object] = {}
        self._budget = MAX_OPCODES

    def run(self, program: io.BytesIO) -> object:
        """Return the value of the next pickle in `program`, which is read up to its end."""
        damage = (ValueError, IndexError, KeyError, ArithmeticError, struct.error)
        try:
            for opcode, argument, _ in pickletools.genops(program):
                self._spend(1)
                if opcode.name == "STOP":
                    return self._stack.pop()
                self._step(opcode.name, argument)
        # Unknown escapes of strings are a warning, which is an error where warnings are.
        except (*damage, DeprecationWarning) as error:
            raise CheckpointError(f"damaged pickle: {short_repr(error)}") from error
        raise CheckpointError("truncated pickle: the STOP instruction is missing")

    def _spend(self, amount: int) -> None:
        self._budget -= amount
        if self._budget < 0:
            raise CheckpointError(f"the pickle has more than {MAX_OPCODES} instructions")

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

    def _pop_to_mark(self) -> list[object]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _drop(self) -> None:
        self._stack.pop()

    def _tuple(self, count: int) -> None:
        items = tuple(self._stack[-count:])
        if len(items) != count:
            raise ValueError("not enough values for a tuple")
        del self._stack[-count:]
        self._push(items)

    def _append(self, items: list[object]) -> None:
        if isinstance(self._stack[-1], list):
            self._stack[-1].extend(items)

    def _set_items(self, items: list[object]) -> None:
        target = self._stack[-1]
        if isinstance(target, dict):
            target.update((_check_key(key), value) for key, value in zip(items[::2], items[1::2]))

    def _dict(self, _: object) -> None:
        items = self._pop_to_mark()
        self._push({})
        self._set_items(items)

    def _push_placeholder(self, name: str, *, is_call: bool = False) -> None:
        self._push(Placeholder(name[:200], is_call))

    def _instance(self, name: str) -> None:
        self._pop_to_mark()
        self._push_placeholder(name, is_call=True)

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("name is not text")
        self._push_placeholder(f"{module}.{name}")

    def _reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._call(function, arguments)

    def _new_object_ex(self) -> None:
        del self._stack[-2:]
        self._call(self._stack.pop(), ())

    def _call(self, function: object, arguments: object) -> None:
        """Push the result of a call if it is in `_CALLS`, otherwise a `Placeholder`."""
        name = function.name if isinstance(function, Placeholder) else type(function).__name__
        is_name = isinstance(function, Placeholder) and not function.is_call
        make = _CALLS.get(name) if is_name else None
        if make is None or not isinstance(arguments, tuple):
            self._push_placeholder(name, is_call=True)
        else:
            self._spend(sum(len(part) for part in arguments if isinstance(part, list | tuple)))
            self._push(make(arguments))

    def _persistent(self, identity: object) -> None:
        """Push the object with a persistent id: a storage or, in the old format, a class.

        The id is ("storage", type, key, device, numel, view) or ("module", class, file, source).
        """
        match identity:
            case ("module", Placeholder(is_call=False) as klass, _, _):
                self._push(klass)
                return
        if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
            raise ValueError("persistent object is not a storage or class")
        _, kind, key, _, numel = identity[:5]
        dtype = _STORAGES.get(kind.name) if isinstance(kind, Placeholder) else None
        if dtype is None or not isinstance(key, str) or type(numel) is not int or numel < 0:
            raise ValueError("invalid storage")
        if any(part is not None for part in identity[5:]):
            raise ValueError("unsupported view of a storage")
        if key not in self._storages:
            self._storages[key] = self._find_storage(key, dtype, numel)
        if (self._storages[key].dtype, self._storages[key].numel) != (dtype, numel):
            raise ValueError("a storage is described twice, with different types or sizes")
        self._push(self._storages[key])

    def _put(self, index: object) -> None:
        self._memo[index if isinstance(index, int) else len(self._memo)] = self._stack[-1]

    def _get(self, index: object) -> None:
        self._push(self._memo[index if isinstance(index, int) else -1])


def _check_key(value: object) -> object:
    """Return a dictionary key; raise `ValueError` for types that are not safe to hash.

    Hashing a deeply nested tuple could exhaust the stack.
    """
    scalar = (str, int, float, bool, bytes, Placeholder, type(None))
    parts = value if isinstance(value, tuple) else (value,)
    if len(parts) > 16 or not all(isinstance(part, scalar) for part in parts):
        raise ValueError(f"unsupported key of a dictionary: {type(value).__name__}")
    return value


def _ordered_dict(arguments: tuple[object, ...]) -> dict[object, object]:
    match arguments:
        case ():
            return {}
        case (list(pairs),) if all(isinstance(pair, list | tuple) for pair in pairs):
            return {_check_key(key): value for key, value in pairs}
    raise ValueError("ordered dictionary is not made of pairs")


def _tensor(arguments: tuple[object, ...]) -> LazyTensor:
    match arguments:
        case (Storage() as storage, int(offset), tuple(shape), tuple(strides), *_):
            return LazyTensor(storage, offset, shape, strides)
    raise ValueError("invalid description of a tensor")


def _parameter(arguments: tuple[object, ...]) -> object:
    """Return the tensor of a parameter; the other arguments only matter for training."""
    return arguments[0]


def _fraction(arguments: tuple[object, ...]) -> Fraction:
    match arguments:
        case (str(text),) if re.fullmatch(r"-?\d{1,18}(/\d{1,18})?", text):
            return Fraction(text)
        case (int(numerator), int(denominator)):
            return Fraction(numerator, denominator)
    raise ValueError("invalid fraction")


def _size(arguments: tuple[object, ...]) -> tuple[object, ...]:
    match arguments:
        case ([*parts],):
            return tuple(parts)
    raise ValueError("invalid shape")


# The only calls in a file that are carried out.
_CALLS: dict[str, Callable[[tuple[object, ...]], object]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
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
    "POP_MARK": lambda self, _: self._pop_to_mark().clear(),
    "DUP": lambda self, _: self._push(self._stack[-1]),
    "TUPLE": lambda self, _: self._push(tuple(self._pop_to_mark())),
    "TUPLE1": lambda self, _: self._tuple(1),
    "TUPLE2": lambda self, _: self._tuple(2),
    "TUPLE3": lambda self, _: self._tuple(3),
    "LIST": lambda self, _: self._push(self._pop_to_mark()),
    "APPEND": lambda self, _: self._append([self._stack.pop()]),
    "APPENDS": lambda self, _: self._append(self._pop_to_mark()),
    "DICT": _Machine._dict,
    "SETITEM": lambda self, _: self._set_items([self._stack.pop(), self._stack.pop()][::-1]),
    "SETITEMS": lambda self, _: self._set_items(self._pop_to_mark()),
    "ADDITEMS": lambda self, _: self._pop_to_mark().clear(),
    "FROZENSET": lambda self, _: self._instance("builtins.frozenset"),
    "GLOBAL": lambda self, name: self._push_placeholder(str(name).replace(" ", ".", 1)),
    "STACK_GLOBAL": lambda self, _: self._stack_global(),
    "INST": lambda self, name: self._instance(str(name).replace(" ", ".", 1)),
    "OBJ": lambda self, _: self._call(self._pop_to_mark()[0], ()),
    "REDUCE": lambda self, _: self._reduce(),
    "NEWOBJ": lambda self, _: self._reduce(),
    "NEWOBJ_EX": lambda self, _: self._new_object_ex(),
    # Ignored: the `_metadata` of a state dict, or the attributes of an object.
    "BUILD": lambda self, _: self._drop(),
    "BINPERSID": lambda self, _: self._persistent(self._stack.pop()),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine._put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine._get),
}
