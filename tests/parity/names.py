"""Compare the names of upstream's modules with ours, for the table of `docs/migration.md`.

`python -m tests.parity.names` rewrites the table.
"""

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import demucs

PAGE = Path(__file__).parents[2] / "docs" / "migration.md"
BEGIN, END = "<!-- names: begin -->\n", "<!-- names: end -->\n"

UPSTREAM = Path(str(demucs.__file__)).parent
TRAINING = {
    "augment",
    "distrib",
    "ema",
    "evaluate",
    "grids",
    "repitch",
    "solver",
    "svd",
    "train",
} | {"wav"}
"""Modules that a program for inference does not import; they are not here."""

MODULES = tuple(
    sorted({path.stem for path in UPSTREAM.glob("*.py")} - TRAINING - {"__init__", "__main__"})
)
IGNORED = {"logger"}

CHANGES = {
    "hdemucs.MultiWrap": "makes a band layer of another class",
    "transformer.CrossTransformerEncoder": "without `make_optim_group`, which is for training",
    "transformer.MyGroupNorm": "has the arguments of `nn.GroupNorm` by name",
    "wiener.wiener": "takes (B S C F T) and complex (B C F T) instead of Open-Unmix's shapes",
    "apply.BagOfModels": "`forward` calls its argument `mix`; members are not changed by `segment`",
    "demucs.Demucs": "`load_state_dict` has the arguments of `nn.Module`",
    "api.Separator": '`device` is "auto" by default: a GPU if there is one',
}
"""What is another way here, by name: only what the comparison finds may be in it."""

Status = Literal["kept", "changed", "left out"]


@dataclass(frozen=True)
class Name:
    """One public name of upstream."""

    module: str
    name: str
    status: Status
    note: str = ""


def list_public_names(module: str) -> list[str]:
    """List what a module of upstream defines without an underscore."""
    names: list[str] = []
    for node in ast.parse((UPSTREAM / f"{module}.py").read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    return sorted(name for name in {*names} - IGNORED if not name.startswith("_"))


def compare_names() -> Iterator[Name]:
    """Compare all public names of the modules for inference."""
    for module in MODULES:
        theirs, ours = (
            import_module(f"{package}.{module}") for package in ("demucs", "demucs_infer")
        )
        for name in list_public_names(module):
            left_out = getattr(ours, "LEFT_OUT", {}).get(name)
            if left_out is not None:
                yield Name(module, name, "left out", left_out)
            elif is_same(getattr(theirs, name), getattr(ours, name)):
                yield Name(module, name, "kept")
            else:
                yield Name(module, name, "changed", CHANGES[f"{module}.{name}"])


def is_same(theirs: Any, ours: Any) -> bool:
    """Return whether a call, or a use of a member, that upstream takes is taken by ours."""
    if not inspect.isclass(theirs):
        return not inspect.isfunction(theirs) or accepts(ours, theirs)
    if issubclass(theirs, Exception):
        return inspect.isclass(ours) and issubclass(ours, Exception)
    members = {name: member for name, member in vars(theirs).items() if not name.startswith("_")}
    return accepts(ours, theirs) and all(
        hasattr(ours, name)
        and (not inspect.isfunction(member) or accepts(getattr(ours, name), member))
        for name, member in members.items()
    )


def accepts(ours: Any, theirs: Any) -> bool:
    """Return whether ours has upstream's parameters first, with its defaults."""
    parameters = list(inspect.signature(ours).parameters.values())
    references = list(inspect.signature(theirs).parameters.values())
    first, rest = parameters[: len(references)], parameters[len(references) :]
    variadic = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return (
        len(first) == len(references)
        and all(map(_is_same_parameter, first, references))
        and all(
            parameter.kind in variadic or parameter.default is not parameter.empty
            for parameter in rest
        )
    )


def _is_same_parameter(ours: inspect.Parameter, theirs: inspect.Parameter) -> bool:
    if (ours.name, ours.kind) != (theirs.name, theirs.kind):
        return False
    if theirs.default is theirs.empty or ours.default == theirs.default:
        return True  # a default where upstream has none takes more
    return _describe_default(ours.default) == _describe_default(theirs.default)


def _describe_default(value: object) -> object:
    """Return a default as one that can be compared between the packages."""
    if isinstance(value, tuple | list):
        return list(value)
    return repr(value) if type(value).__name__ in ("_NotProvided",) else value


def make_table() -> str:
    """Return the table, and the lists of what is changed and left out, as Markdown."""
    names = list(compare_names())
    lines = ["| module | kept |", "|---|---|"]
    for module in MODULES:
        kept = [
            f"`{entry.name}`" for entry in names if (entry.module, entry.status) == (module, "kept")
        ]
        lines.append(f"| `{module}` | {', '.join(kept) or 'nothing'} |")
    for status, title in (("changed", "in another form"), ("left out", "left out: why")):
        lines += ["", f"| module | {title} | |", "|---|---|---|"]
        entries = [entry for entry in names if entry.status == status]
        for module, note in dict.fromkeys((entry.module, entry.note) for entry in entries):
            group = [
                f"`{entry.name}`"
                for entry in entries
                if (entry.module, entry.note) == (module, note)
            ]
            lines.append(f"| `{module}` | {', '.join(group)} | {note} |")
    modules = ", ".join(f"`{module}`" for module in sorted(TRAINING))
    lines += ["", f"Modules that are left out, since they are for training: {modules}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Rewrite the table in the page."""
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + make_table() + END + rest.partition(END)[2], "utf-8")


if __name__ == "__main__":
    main()
