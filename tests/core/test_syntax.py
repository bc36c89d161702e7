"""The ref grammar: each form that is documented, and nothing else."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dcpstore.core.syntax import Ref, check_name, nearest_name, parse_ref
from dcpstore.errors import InvalidInputError

# Characters of names, of suffixes, and a few that neither has: near misses are likely.
PIECES = st.lists(
    st.sampled_from([*"av_19.-/=+@~ é", "@step=", "step=", "~1", "v7", "epoch=0"]), max_size=8
).map("".join)


def accepted(text: str) -> bool:
    try:
        check_name(text, kind="tag")
    except InvalidInputError:
        return False
    return True


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        (12, Ref(number=12)),
        ("12", Ref(number=12)),
        ("v12", Ref(number=12)),
        ("best", Ref(name="best")),
        ("try/lr-3", Ref(name="try/lr-3")),
        ("main~3", Ref(name="main", up=3)),
        ("main@step=1000", Ref(name="main", step=1000)),
        ("v7~1", Ref(number=7, up=1)),
        ("2147483648", Ref(number=2147483648, uid="2147483648")),
        ("007000@step=3", Ref(number=7000, uid="007000", step=3)),
        ("abcdef~2", Ref(name="abcdef", uid="abcdef", up=2)),
        ("1ABCDEF", Ref(uid="1abcdef")),
        ("epoch=0-step=8", Ref(name="epoch=0-step=8")),
        ("epoch=0-step=8~1", Ref(name="epoch=0-step=8", up=1)),
        ("epoch=0-step=8~1@step=8", Ref(name="epoch=0-step=8", up=1, step=8)),
        ("a@step=5", Ref(name="a", step=5)),
        ("a@@step=5", Ref(name="a@", step=5)),
        ("a@step@step=5", Ref(name="a@step", step=5)),
        ("run@home+1", Ref(name="run@home+1")),
        ("main/rank-0@step=5", Ref(name="main/rank-0", step=5)),
        ("v12=3", Ref(name="v12=3")),
    ],
)
def test_documented_forms(text: str | int, ref: Ref) -> None:
    assert parse_ref(text) == ref
    assert parse_ref(str(ref)) == ref


@pytest.mark.parametrize(
    "text",
    [
        *("", "-1", "main~", "main~x", "main@step=", "main@step=x", "main@step=5~1"),
        *("a@step=5@step=6", "a b", "../x", "ä", "best;drop", "=a", "@a", "+a", True, "9" * 30),
    ],
)
def test_all_other_forms_are_refused(text: str) -> None:
    with pytest.raises(InvalidInputError):
        parse_ref(text)


@pytest.mark.parametrize(
    ("name", "offer"),
    {
        "v12": "_v12",
        "12": "_12",
        "": "checkpoint",
        "/": "checkpoint",
        "a..b": "a.b",
        "a//b": "a/b",
        "/ckpts/step_100/": "ckpts/step_100",
        "x" * 201: "x" * 200,
        "a~1": "a-1",
        "a\n": "a",
        "a@step=5": "a-step=5",
        "a@step=": "a-step=",
        "=a": "a",
        "épo que": "epo-que",
        "2026-01-01": "_2026-01-01",
        "v12/": "_v12",
    }.items(),
)
def test_names_that_are_refused_come_with_one_that_is_allowed(name: str, offer: str) -> None:
    with pytest.raises(InvalidInputError, match="tag name") as refused:
        check_name(name, kind="tag")
    assert f"{offer!r} is allowed" in str(refused.value)
    assert accepted(offer)


@given(st.text(max_size=20) | PIECES, st.integers(1, 99), st.integers(0, 99))
@example("epoch=0-step=8", 1, 8)
@example("v" + "1" * 199 + "a", 1, 1)
def test_a_name_resolves_to_itself_with_each_suffix_or_comes_with_an_offer(
    text: str, up: int, step: int
) -> None:
    name = nearest_name(text)
    assert accepted(name)
    assert accepted(text) == (name == text)
    for ref, walk in {
        name: Ref(),
        f"{name}~{up}": Ref(up=up),
        f"{name}@step={step}": Ref(step=step),
        f"{name}~{up}@step={step}": Ref(up=up, step=step),
    }.items():
        parsed = parse_ref(ref)
        assert (parsed.name, parsed.number) == (name, None)
        assert (parsed.up, parsed.step) == (walk.up, walk.step)
        assert parse_ref(str(parsed)) == parsed
