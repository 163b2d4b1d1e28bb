"""The public names of the modules that others import, with all that a caller may rely on.

Annotations are written the same whether they are objects or text (`from __future__ import
annotations`), and without the modules of what they name: a class that moves to another module, and
can still be imported from where it was, is no change.
"""

import ast
import dataclasses
import enum
import functools
import inspect
import json
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.snapshot import DATA

PACKAGE = "demucs_infer"
ROOT = Path(__file__).parents[2]
MODULES = (
    "demucs_infer",
    "demucs_infer.api",
    "demucs_infer.apply",
    "demucs_infer.audio",
    "demucs_infer.demucs",
    "demucs_infer.engine.chunking",
    "demucs_infer.extension",
    "demucs_infer.custom.build",
    "demucs_infer.custom.config",
    "demucs_infer.custom.metadata",
    "demucs_infer.custom.registry",
    "demucs_infer.custom.adapter",
    "demucs_infer.hdemucs",
    "demucs_infer.htdemucs",
    "demucs_infer.log",
    "demucs_infer.metrics",
    "demucs_infer.pretrained",
    "demucs_infer.repo",
    "demucs_infer.separate",
    "demucs_infer.spec",
    "demucs_infer.states",
    "demucs_infer.transformer",
    "demucs_infer.wdemucs",
)
_SPOKEN = ("__call__", "__contains__", "__enter__", "__exit__", "__getitem__", "__iter__",
           "__len__")  # fmt: skip
"""What a caller says by syntax, and not by name."""

_DOTTED = re.compile(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_EMPTY = inspect.Parameter.empty


def file_of(module: str) -> str:
    """Name the data file of a module."""
    return f"names/{module}.json"


def collect_signatures(module: str) -> dict[str, Any]:
    """Describe what a module publishes.

    A name that was published once belongs to it as long as it can be imported from there, wherever
    it is defined by then.
    """
    found = import_module(module)
    names = {name for name in _stored(module) if hasattr(found, name)} | set(_published(found))
    return {name: _described(getattr(found, name)) for name in sorted(names)}


def _stored(module: str) -> list[str]:
    file = DATA / file_of(module)
    return list(json.loads(file.read_text("utf-8"))) if file.exists() else []


def _published(module: types.ModuleType) -> list[str]:
    """List what `__all__` names, or else what is defined there without an underscore."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    names: list[str] = []
    for node in ast.parse(Path(str(module.__file__)).read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [one.id for part in targets for one in ast.walk(part)
                      if isinstance(one, ast.Name)]  # fmt: skip
    return [name for name in names if not name.startswith("_") and hasattr(module, name)]


def _described(value: object) -> Any:
    is_parametrized = typing.get_origin(value) is not None  # a class to Python 3.10, as `list[int]`
    if isinstance(value, type) and not is_parametrized:
        return _described_class(value)
    if inspect.isroutine(value):
        return {"kind": "function", **_called(value)}
    if isinstance(value, types.GenericAlias | types.UnionType | typing.TypeVar) or (
        type(value).__module__ == "typing"
    ):
        return {"kind": "type", "is": _annotation(value)}
    return {"kind": "value", "is": _shown(value)}


# ── classes ──


def _described_class(found: type) -> dict[str, Any]:
    bases = [one.__name__ for one in found.__mro__[1:] if not one.__name__.startswith("_")]
    kept = [name for name in bases if name not in ("object", "Generic", "Protocol", "ReprEnum")]
    told: dict[str, Any] = {"kind": "class", "bases": kept}
    if issubclass(found, enum.Enum):
        return told | {"members": {one.name: _shown(one.value) for one in found}}
    if typing.is_typeddict(found):
        return told | {"keys": _keys(found)}
    if dataclasses.is_dataclass(found):
        told["fields"] = {one.name: _field(one) for one in dataclasses.fields(found)}
    if _is_made_by_us(found):
        told["made"] = _called(found)["parameters"]
    members = {name: _member(found, name) for name in _member_names(found)}
    return told | {"members": {name: one for name, one in members.items() if one is not None}}


def _ours(found: type) -> list[type]:
    return [one for one in found.__mro__ if one.__module__.partition(".")[0] == PACKAGE]


def _is_made_by_us(found: type) -> bool:
    """Tell whether the package says how it is made, and not Python or PyTorch."""
    is_protocol = getattr(found, "_is_protocol", False)  # its own `__init__` is never called
    said = any({"__init__", "__new__"} & vars(one).keys() for one in _ours(found))
    return said and not is_protocol


def _member_names(found: type) -> list[str]:
    names = {name for one in _ours(found) for name in vars(one)}
    fields = {one.name for one in _fields(found)}
    return sorted(one for one in names - fields if not one.startswith("_") or one in _SPOKEN)


def _fields(found: type) -> tuple[Any, ...]:
    return dataclasses.fields(found) if dataclasses.is_dataclass(found) else ()


def _member(found: type, name: str) -> Any:
    value = inspect.getattr_static(found, name)
    if isinstance(value, property):
        text = _annotation(inspect.signature(value.fget).return_annotation) if value.fget else ""
        return {"kind": "property", "returns": text}
    if isinstance(value, functools.cached_property):
        return {"kind": "property", "returns": _annotation(
            inspect.signature(value.func).return_annotation)}  # fmt: skip
    if isinstance(value, classmethod | staticmethod):
        return {"kind": type(value).__name__, **_called(getattr(found, name))}
    if inspect.isroutine(value):
        return {"kind": "method", **_called(value)}
    if inspect.isdatadescriptor(value) or type(value).__name__ == "_tuplegetter":
        return {"kind": "attribute"}
    return _described(value)


def _field(found: "dataclasses.Field[Any]") -> str:
    text = f"{found.name}: {_annotation(found.type)}"
    if found.default is not dataclasses.MISSING:
        text += f" = {_shown(found.default)}"
    elif found.default_factory is not dataclasses.MISSING:
        text += f" = {_shown(found.default_factory())}"
    return text if found.init else f"{text} (not told)"


# ── calls ──


def _called(found: Callable[..., Any]) -> dict[str, Any]:
    signature = inspect.signature(found)
    told: dict[str, Any] = {"parameters": list(_parameters(found, signature))}
    if not isinstance(found, type):
        told["returns"] = _annotation(signature.return_annotation)
    return told


def _parameters(found: Callable[..., Any], signature: inspect.Signature) -> Iterator[str]:
    """Yield one line a parameter, with `/` and `*` as they are written."""
    before = None
    for one in signature.parameters.values():
        if before is one.POSITIONAL_ONLY and one.kind is not one.POSITIONAL_ONLY:
            yield "/"
        if one.kind is one.KEYWORD_ONLY and before not in (one.KEYWORD_ONLY, one.VAR_POSITIONAL):
            yield "*"
        before = one.kind
        yield _parameter(one)
        if one.kind is one.VAR_KEYWORD:
            yield from _unpacked(found, one)
    if before is inspect.Parameter.POSITIONAL_ONLY:
        yield "/"


def _parameter(one: inspect.Parameter) -> str:
    text = one.name
    if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD):
        text = ("*" if one.kind is one.VAR_POSITIONAL else "**") + text
    if one.annotation is not _EMPTY:
        text += f": {_annotation(one.annotation)}"
    return text if one.default is _EMPTY else f"{text} = {_shown(one.default)}"


def _unpacked(found: Callable[..., Any], one: inspect.Parameter) -> Iterator[str]:
    """Yield the names behind `**parameters: Unpack[Parameters]`: they are typed by callers."""
    name = re.fullmatch(r"(?:\w+\.)*Unpack\[([\w.]+)\]", str(one.annotation).strip("'\""))
    if name is not None:
        home = vars(sys.modules[found.__module__])
        yield from (f"  {line}" for line in _keys(home[name[1].rpartition(".")[2]]))


def _keys(found: type) -> list[str]:
    return sorted(f"{name}: {_annotation(one)}" for name, one in found.__annotations__.items())


# ── text ──


def _annotation(found: object) -> str:
    """Write an annotation, as an object or as text, in one form and without modules."""
    if found is _EMPTY:
        return ""
    if isinstance(found, typing.ForwardRef):
        found = found.__forward_arg__
    return _plain(found if isinstance(found, str) else _written(found))


def _plain(text: str) -> str:
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError:  # the text of an object that is no annotation
        return _DOTTED.sub("", text)
    return ast.unparse(_Bare().visit(tree))


class _Bare(ast.NodeTransformer):
    """`torch.Tensor` becomes `Tensor`, and text within an annotation what it names."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        return ast.Name(node.attr)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str):
            return ast.parse(_plain(node.value), mode="eval").body
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        node.value = self.visit(node.value)
        if isinstance(node.value, ast.Name) and node.value.id == "Literal":
            return node
        self.generic_visit(node)
        return node


def _written(found: Any) -> str:
    """Write an annotation that is an object: `typing` writes some of them in its own way."""
    origin, arguments = typing.get_origin(found), typing.get_args(found)
    if found is None or found is type(None):
        return "None"
    if found is Ellipsis:
        return "..."
    if isinstance(found, list):  # the arguments of a Callable
        return f"[{', '.join(map(_written, found))}]"
    if origin is typing.Union or origin is types.UnionType:
        return " | ".join(map(_annotation, arguments))
    if origin is typing.Literal:
        return f"Literal[{', '.join(map(repr, arguments))}]"
    if origin is not None and arguments:
        return f"{getattr(origin, '__name__', origin)}[{', '.join(map(_argument, arguments))}]"
    if isinstance(found, typing.TypeVar | typing.ForwardRef):
        return found.__name__ if isinstance(found, typing.TypeVar) else found.__forward_arg__
    return str(getattr(found, "__qualname__", found))


def _argument(found: Any) -> str:
    return _written(found) if isinstance(found, list) else _annotation(found)


def _shown(value: object) -> str:
    """Write a value without where it lies and where its class is defined."""
    if inspect.isroutine(value) or isinstance(value, type):
        return f"<{value.__name__}>"
    text = _ADDRESS.sub("", repr(value))
    text = text.replace(f"{ROOT}{os.sep}", "")  # a checkout lies in another folder everywhere
    return re.sub(rf"\b{PACKAGE}(?:\.\w+)*\.(?=\w)", "", text)
