"""Choose the stems to return: which ones networks compute, and which are sums of others.

A rule defines a stem as a weighted sum, such as `drumless=mixture-drums` or
`band = bass + 0.5*other`. Its operands are `mixture`, the stems of the model, and the names of
earlier rules.

Shapes: S stems, C channels, T samples of the track.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from demucs_infer.options import StemOptions

MIXTURE = "mixture"

_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_NAME = r"[^\W\d][\w.]*"
_MAX_NAME_BYTES = 100  # file systems allow 255, and the name of an output has other parts


@dataclass(frozen=True, slots=True)
class Rule:
    """A stem that is a weighted sum of other stems."""

    name: str
    terms: tuple[tuple[float, str], ...]
    """(coefficient, operand), in the order in which they are added."""

    def __str__(self) -> str:
        terms = []
        for coefficient, operand in self.terms:
            factor = "" if abs(coefficient) == 1 else f"{abs(coefficient):g}*"
            terms.append(f"{'-' if coefficient < 0 else '+'}{factor}{operand}")
        return f"{self.name}={''.join(terms).removeprefix('+')}"

    def apply(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the sum as a new tensor."""
        total: Tensor | None = None
        for coefficient, operand in self.terms:
            term = values[operand] if coefficient == 1 else values[operand] * coefficient
            total = term if total is None else total + term
        if total is None:
            raise ValueError(f"the rule for {self.name!r} has no terms: add at least one stem")
        return total.clone() if len(self.terms) == 1 else total


def parse_stem_rule(text: str, names: Iterable[str] = ()) -> Rule:
    """Parse a rule, such as "drumless = mixture - drums".

    A stem whose name has a special character, such as "lead-vocals", must be in `names`; otherwise
    its `-` is read as minus.

    Raises `ValueError` if `text` is not a rule.

    >>> parse_stem_rule("drumless = mixture - drums")
    Rule(name='drumless', terms=((1.0, 'mixture'), (-1.0, 'drums')))
    """
    name, equals, expression = (part.strip() for part in text.partition("="))
    if not (name and equals and expression):
        raise ValueError(f"rule {text!r} must look like 'drumless=mixture-drums'")
    if len(name.encode(errors="surrogateescape")) > _MAX_NAME_BYTES:
        raise ValueError(
            f"the name {name[:20]!r}... is too long for a file name: "
            f"use at most {_MAX_NAME_BYTES} bytes"
        )
    # Longest first: with the stems `a` and `a-b`, `a-b` is a stem and `a - b` a difference.
    escaped = [re.escape(stem) for stem in sorted(names, key=len, reverse=True)]
    operand = "|".join([*escaped, _NAME])
    term = re.compile(rf"\s*([+-])?\s*(?:({_NUMBER})\s*\*?\s*)?({operand})\s*")
    terms: list[tuple[float, str]] = []
    at = 0
    while at < len(expression):
        match = term.match(expression, at)
        if match is None or (terms and match[1] is None):
            raise ValueError(f"rule {text!r} has a syntax error at {expression[at:].strip()!r}")
        sign = -1.0 if match[1] == "-" else 1.0
        terms.append((sign * float(match[2] or 1), match[3]))
        at = match.end()
    return Rule(name, tuple(terms))


@dataclass(frozen=True, slots=True)
class StemPlan:
    """The stems to return, and what the networks must compute for them."""

    sources: tuple[str, ...]
    """Stems of the model."""
    outputs: tuple[str, ...]
    """Stems to return, in order: stems of the model and names of rules."""
    rules: tuple[Rule, ...] = ()
    """Rules that the outputs need, in order."""
    computed: tuple[int, ...] = field(init=False)
    """Indices into `sources` of the stems to compute, ascending."""
    needs_mixture: bool = field(init=False)
    """Whether a rule uses the mixture."""

    def __post_init__(self) -> None:
        wanted = {*self.outputs, *(operand for rule in self.rules for _, operand in rule.terms)}
        computed = tuple(i for i, name in enumerate(self.sources) if name in wanted)
        object.__setattr__(self, "computed", computed)
        object.__setattr__(self, "needs_mixture", MIXTURE in wanted)

    @property
    def is_identity(self) -> bool:
        """Whether the outputs are the computed stems, in the same order."""
        return self.outputs == tuple(self.sources[i] for i in self.computed)

    def derive(self, stems: Tensor, mixture: Tensor | None = None) -> Tensor:
        """Derive the outputs from the computed stems (..., S, C, T) and the mixture (..., C, T)."""
        import torch  # not at the top: the command line chooses stems before it loads torch

        if self.is_identity:
            return stems
        names = [self.sources[i] for i in self.computed]
        values = dict(zip(names, stems.unbind(dim=-3), strict=True))
        if mixture is not None:
            values[MIXTURE] = mixture
        for rule in self.rules:
            values[rule.name] = rule.apply(values)
        return torch.stack([values[name] for name in self.outputs], dim=-3)


def choose_stems(
    sources: Sequence[str],
    *,
    stems: Sequence[str] | None = None,
    derive: Iterable[str | Rule] = (),
    two_stems: str | None = None,
    other_method: Literal["add", "minus", "none"] = "add",
) -> StemPlan:
    """Choose which stems to return; raise one `ValueError` that reports all mistakes.

    `stems=None` selects every stem of the model, then every rule. If `stems` includes a rule,
    exactly these stems are returned, in this order; otherwise all rules are appended to them.
    `two_stems="X"` selects X and, by `other_method`, `no_X`, the sum of the other stems ("add");
    `minus_X`, the mixture minus X, without computing the other stems ("minus"); or only X ("none").
    """
    problems: list[str] = []
    rules = _read_rules(sources, derive, problems)
    if two_stems is not None:
        if stems is not None:
            problems.append("stems and two_stems exclude each other: use only one of them")
        stems = [two_stems]
        rules += _complement(sources, two_stems, other_method, problems)
    _check_rules(sources, rules, problems)
    names = [rule.name for rule in rules]
    outputs = _outputs(sources, names, stems, problems)
    if problems:
        raise ValueError("\n".join(problems))
    return StemPlan(tuple(sources), outputs, tuple(_select_used(rules, outputs)))


def plan_stems(sources: Sequence[str], options: StemOptions) -> StemPlan:
    """Call `choose_stems` with the fields of `options`."""
    return choose_stems(
        sources,
        stems=options.stems,
        derive=options.derive,
        two_stems=options.two_stems,
        other_method=options.other_method,
    )


def derive_stems(
    separated: Mapping[str, Tensor], mixture: Tensor, rules: Iterable[str | Rule]
) -> dict[str, Tensor]:
    """Return `separated`, followed by the stems that `rules` derive from it and from `mixture`."""
    plan = choose_stems(list(separated), derive=rules)
    values = {**separated, MIXTURE: mixture}
    for rule in plan.rules:
        values[rule.name] = rule.apply(values)
    return {name: values[name] for name in plan.outputs}


def needed_members(
    weights: Sequence[Sequence[float]], computed: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """Return the stems of `computed` for which each network of a bag has a weight other than 0."""
    return tuple(tuple(i for i in computed if member[i] != 0) for member in weights)


def _read_rules(
    sources: Sequence[str], derive: Iterable[str | Rule], problems: list[str]
) -> list[Rule]:
    rules: list[Rule] = []
    for rule in [derive] if isinstance(derive, str) else derive:
        if isinstance(rule, Rule):
            rules.append(rule)
            continue
        try:
            rules.append(parse_stem_rule(rule, [*sources, *(earlier.name for earlier in rules)]))
        except ValueError as error:
            problems.append(str(error))
    return rules


def _complement(sources: Sequence[str], stem: str, method: str, problems: list[str]) -> list[Rule]:
    others = [(1.0, name) for name in sources if name != stem]
    if method not in ("add", "minus", "none"):
        problems.append(f"other_method = {method!r} must be one of add, minus, none")
    if stem not in sources or method not in ("add", "minus"):
        return []  # an unknown stem is reported by `_outputs`
    if method == "minus":
        return [Rule(f"minus_{stem}", ((1.0, MIXTURE), (-1.0, stem)))]
    if not others:
        problems.append(
            f"other_method = 'add' needs other stems, but {stem!r} is the only one: choose 'minus'"
        )
        return []
    return [Rule(f"no_{stem}", tuple(others))]


def _check_rules(sources: Sequence[str], rules: Sequence[Rule], problems: list[str]) -> None:
    defined = {*sources, MIXTURE}
    all_names = [rule.name for rule in rules]
    for rule in rules:
        if rule.name in defined:
            problems.append(f"rule '{rule}': the name {rule.name!r} is taken: choose another")
        if not rule.terms:
            problems.append(f"the rule for {rule.name!r} has no terms: add at least one stem")
        for _, operand in rule.terms:
            if operand in defined:
                continue
            if operand in all_names:
                problems.append(f"rule '{rule}': {operand!r} must be defined before it is used")
            else:
                choices = ", ".join([MIXTURE, *sources, *(n for n in all_names if n in defined)])
                problems.append(f"rule '{rule}': no stem named {operand!r}; available: {choices}")
        defined.add(rule.name)


def _outputs(
    sources: Sequence[str], names: Sequence[str], stems: Sequence[str] | None, problems: list[str]
) -> tuple[str, ...]:
    if stems is None:
        return (*sources, *names)
    if isinstance(stems, str):
        problems.append(f"stems = {stems!r} must be a list of names, such as [{stems!r}]")
        return ()
    if not stems:
        problems.append("stems is empty: name at least one, or omit it for all")
    choices = ", ".join([*sources, *names])
    for stem in dict.fromkeys(stems):
        if stem not in {*sources, *names}:
            problems.append(f"no stem named {stem!r}; available: {choices}")
        if list(stems).count(stem) > 1:
            problems.append(f"stem {stem!r} is named more than once")
    if set(names) & set(stems):
        return tuple(stems)
    return (*stems, *names)


def _select_used(rules: Sequence[Rule], outputs: Sequence[str]) -> list[Rule]:
    wanted, used = set(outputs), []
    for rule in reversed(rules):
        if rule.name in wanted:
            used.append(rule)
            wanted |= {operand for _, operand in rule.terms}
    return used[::-1]
