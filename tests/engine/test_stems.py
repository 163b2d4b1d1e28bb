"""Only needed stems are computed, rules are parsed, and mistakes are reported together."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from demucs_infer.engine.stems import (
    Rule,
    StemPlan,
    choose_stems,
    derive_stems,
    needed_members,
    parse_stem_rule,
)

FOUR = ["drums", "bass", "other", "vocals"]


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("x=mixture-drums", [(1, "mixture"), (-1, "drums")]),
        ("x = bass + other", [(1, "bass"), (1, "other")]),
        ("x=-bass+0.5*other", [(-1, "bass"), (0.5, "other")]),
        ("x=.5bass-2e-1 other", [(0.5, "bass"), (-0.2, "other")]),
        ("x=2 * drums", [(2, "drums")]),
        ("x=gitárre", [(1, "gitárre")]),
    ],
)
def test_parse_stem_rule(text: str, terms: list[tuple[float, str]]) -> None:
    rule = parse_stem_rule(text)
    assert rule == Rule("x", tuple((float(c), name) for c, name in terms))
    assert parse_stem_rule(str(rule)) == rule


def test_rule_accepts_a_stem_name_with_a_minus() -> None:
    rule = parse_stem_rule("x=mixture-lead-vocals", ["lead-vocals", "lead"])
    assert rule.terms == ((1.0, "mixture"), (-1.0, "lead-vocals"))


@pytest.mark.parametrize(
    "text",
    ["", "x", "x=", "=bass", "x=bass other", "x=bass+", "x=bass//2", "x=2", "x=1*2*a", "x=(a)"],
)
def test_invalid_rule_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="rule"):
        parse_stem_rule(text)


@given(
    terms=st.lists(
        st.tuples(st.sampled_from([1, -1, 2, -3, 0.5]), st.sampled_from(FOUR)),
        min_size=1,
        max_size=6,
    )
)
def test_apply_adds_the_terms_of_a_rule(terms: list[tuple[float, str]]) -> None:
    values = {name: torch.full((2, 3), float(10**i)) for i, name in enumerate(FOUR)}
    rule = Rule("x", tuple(terms))
    expected = sum(c * 10 ** FOUR.index(name) for c, name in terms)
    assert torch.equal(rule.apply(values), torch.full((2, 3), float(expected)))
    assert rule.apply(values).data_ptr() not in {v.data_ptr() for v in values.values()}


def test_default_is_all_stems_then_rules() -> None:
    plan = choose_stems(FOUR)
    assert plan.outputs == tuple(FOUR)
    assert plan.is_identity
    assert plan.computed == (0, 1, 2, 3)
    plan = choose_stems(FOUR, derive=["instrum=mixture-vocals", "band=instrum-drums"])
    assert plan.outputs == (*FOUR, "instrum", "band")
    assert plan.needs_mixture


def test_only_needed_stems_are_computed() -> None:
    plan = choose_stems(FOUR, stems=["vocals"])
    assert (plan.computed, plan.needs_mixture) == ((3,), False)
    plan = choose_stems(FOUR, stems=["vocals", "drums"])
    assert plan.outputs == ("vocals", "drums")
    assert plan.computed == (0, 3)
    plan = choose_stems(FOUR, stems=["instrum"], derive=["instrum=mixture-vocals", "x=drums"])
    assert (plan.outputs, plan.computed) == (("instrum",), (3,))
    assert [rule.name for rule in plan.rules] == ["instrum"]
    # A rule that only another one needs is computed, but not returned.
    plan = choose_stems(FOUR, stems=["b"], derive=["a=drums+bass", "b=mixture-a"])
    assert (plan.outputs, plan.computed) == (("b",), (0, 1))


def test_two_stems_are_a_stem_and_its_complement() -> None:
    plan = choose_stems(FOUR, two_stems="vocals")
    assert (plan.outputs, plan.computed) == (("vocals", "no_vocals"), (0, 1, 2, 3))
    plan = choose_stems(FOUR, two_stems="vocals", other_method="minus")
    assert (plan.outputs, plan.computed) == (("vocals", "minus_vocals"), (3,))
    assert plan.needs_mixture
    plan = choose_stems(FOUR, two_stems="vocals", other_method="none")
    assert (plan.outputs, plan.computed) == (("vocals",), (3,))
    plan = choose_stems(FOUR, two_stems="vocals", derive=["band=drums+bass"])
    assert [rule.name for rule in plan.rules] == ["band", "no_vocals"]
    assert plan.outputs == ("vocals", "band", "no_vocals")


@pytest.mark.parametrize("shape", [(2, 100), (3, 2, 100)])
def test_derive_keeps_the_order_of_outputs(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    stems = torch.rand((*shape[:-2], 2, *shape[-2:]), generator=generator)
    mixture = torch.rand(shape, generator=generator)
    plan = choose_stems(
        FOUR, stems=["vocals", "x", "drums", "y"], derive=["x=mixture-vocals", "y=x+2*drums"]
    )
    drums, vocals = stems.unbind(-3)
    out = plan.derive(stems, mixture)
    expected = [vocals, mixture - vocals, drums, mixture - vocals + 2 * drums]
    assert torch.equal(out, torch.stack(expected, dim=-3))


def test_derive_stems_of_a_dictionary() -> None:
    separated = {"drums": torch.full((2, 4), 1.0), "vocals": torch.full((2, 4), 2.0)}
    mixture = torch.full((2, 4), 7.0)
    out = derive_stems(separated, mixture, ["instrum=mixture-vocals", "x=instrum+drums"])
    assert list(out) == ["drums", "vocals", "instrum", "x"]
    assert torch.equal(out["instrum"], torch.full((2, 4), 5.0))
    assert torch.equal(out["x"], torch.full((2, 4), 6.0))
    assert list(separated) == ["drums", "vocals"]


def test_all_mistakes_are_reported_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        choose_stems(
            FOUR,
            stems=["vocals", "piano", "vocals"],
            derive=["drums=bass", "a=b+bass", "b=guitar", "nonsense", "mixture=bass"],
        )
    lines = str(caught.value).splitlines()
    wanted = [
        "rule 'nonsense' must look like",
        "the name 'drums' is taken",
        "'b' must be defined before it is used",
        "no stem named 'guitar'",
        "the name 'mixture' is taken",
        "no stem named 'piano'; available: drums",
        "'vocals' is named more than once",
    ]
    assert len(lines) == len(wanted)
    for words in wanted:
        assert any(words in line for line in lines), words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"stems": []}, "stems is empty"),
        ({"stems": "vocals"}, r"a list of names, such as \['vocals'\]"),
        ({"two_stems": "vocals", "stems": ["drums"]}, "exclude each other"),
        ({"two_stems": "piano"}, "no stem named 'piano'"),
        ({"two_stems": "vocals", "other_method": "max"}, "add, minus, none"),
        ({"derive": [Rule("x", ())]}, "has no terms"),
        ({"derive": ["x=x"]}, "must be defined before"),
        ({"derive": ["x=drums", "x=bass"]}, "'x' is taken"),
        ({"derive": [f"{'x' * 101}=drums"]}, "too long for a file name: use at most 100 bytes"),
    ],
)
def test_invalid_choice_is_rejected(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        choose_stems(FOUR, **arguments)  # type: ignore[arg-type]


def test_complement_of_the_only_stem_needs_minus() -> None:
    with pytest.raises(ValueError, match="other_method = 'add' .*: choose 'minus'"):
        choose_stems(["vocals"], two_stems="vocals")
    assert choose_stems(["vocals"], two_stems="vocals", other_method="minus").needs_mixture


def test_member_without_weight_is_not_needed() -> None:
    identity = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert needed_members(identity, (3,)) == ((), (), (), (3,))
    assert needed_members(identity, (0, 1, 2, 3)) == ((0,), (1,), (2,), (3,))
    assert needed_members([[1, -1], [0, 2]], (0, 1)) == ((0, 1), (1,))


def test_stem_plan_is_a_hashable_value() -> None:
    assert choose_stems(FOUR) == StemPlan(tuple(FOUR), tuple(FOUR))
    assert hash(choose_stems(FOUR)) == hash(choose_stems(FOUR))
