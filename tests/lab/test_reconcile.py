"""What we booked against what they counted: which differences are none, which a doubt explains, what may be freed."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.call import Basis
from gateway.domain.ledger import Amounts, Dimensions, LedgerRow, Source, State
from gateway.lab.provider_usage import UsageDay
from gateway.lab.reconcile import BookedDay, Difference, booked_days, over_all_days, reconcile

DAY = "2026-11-20"
TODAY = "2026-11-21"
CENT = 10_000_000
MODEL = "mistral/open-mistral-7b"


def row(
    id: str,
    *,
    tokens: int = 100,
    nusd: int = 10 * CENT,
    state: State = "posted",
    basis: Basis = "exact",
    at: str = f"{DAY}T12:00:00",
    model: str = MODEL,
    source: Source = "gateway",
) -> LedgerRow:
    at_ms = int(datetime.fromisoformat(at).replace(tzinfo=UTC).timestamp() * 1000)
    prompt = tokens // 4 if state == "posted" else 0
    return LedgerRow(
        id=id, at_ms=at_ms, env="dev", on=Dimensions(agent="qa_agent", model=model), amounts=Amounts(nusd, 1, tokens),
        state=state, basis=basis, prompt_tokens=prompt, completion_tokens=tokens - prompt if prompt else 0,
        source=source,
    )  # fmt: skip


def doubt(id: str, tokens: int = 1_000, nusd: int = 100 * CENT) -> LedgerRow:
    return row(id, tokens=tokens, nusd=nusd, state="in_doubt", basis="bound")


def theirs(tokens: int, nusd: int | None = None, requests: int | None = None, *, day: str = DAY) -> UsageDay:
    return UsageDay(day, "open-mistral-7b", tokens // 4, tokens - tokens // 4, nusd, requests)


def compared(rows: list[LedgerRow], *days: UsageDay, today: str = TODAY, upstream: str = "mistral") -> list[Difference]:
    return reconcile(booked_days(rows), days, today=today, upstream=upstream)


# Name, our rows, their figures; then verdict, what may be freed, what may be posted.
CASES: list[tuple[str, list[LedgerRow], UsageDay, str, tuple[str, ...], tuple[tuple[str, Amounts], ...]]] = [
    ("the same", [row("a"), row("b")], theirs(200, 20 * CENT, 2), "equal", (), ()),
    ("the same, in tokens alone", [row("a")], theirs(100), "equal", (), ()),
    ("rounded to a cent", [row("a")], theirs(100, 10 * CENT + CENT), "equal", (), ()),
    ("more than a cent off", [row("a")], theirs(100, 10 * CENT + CENT + 1), "price", (), ()),
    ("cheaper than we think", [row("a")], theirs(100, 8 * CENT), "price", (), ()),
    ("they never saw it", [row("a"), doubt("d")], theirs(100, 10 * CENT, 1), "explained by doubt", ("d",), ()),
    ("nothing but doubts", [doubt("d"), doubt("e")], theirs(0, 0, 0), "explained by doubt", ("d", "e"), ()),
    ("a request without tokens", [row("a"), doubt("d")], theirs(100, None, 2), "explained by doubt", (), ()),
    ("one doubt, and what it cost", [row("a"), doubt("d")], theirs(400, 40 * CENT), "explained by doubt", (),
     (("d", Amounts(30 * CENT, 1, 300)),)),
    ("one doubt, its dollars unknown", [row("a"), doubt("d")], theirs(400), "explained by doubt", (), ()),
    ("two doubts, one of them billed", [doubt("d"), doubt("e")], theirs(400, 40 * CENT), "explained by doubt", (), ()),
    ("all of the hold", [doubt("d")], theirs(1_000, 100 * CENT), "explained by doubt", (),
     (("d", Amounts(100 * CENT, 1, 1_000)),)),
    ("more than the hold", [doubt("d")], theirs(1_001, 100 * CENT), "unexplained", (), ()),
    ("dollars above the hold", [doubt("d")], theirs(900, 103 * CENT), "unexplained", (), ()),
    ("they counted less", [row("a"), doubt("d")], theirs(99), "unexplained", (), ()),
    ("they counted more", [row("a")], theirs(101), "unexplained", (), ()),
    ("an estimate of ours", [row("a"), row("e", basis="estimate")], theirs(150), "explained by doubt", (), ()),
    ("an estimate may hide a doubt", [row("e", basis="bound"), doubt("d")], theirs(0), "explained by doubt", (), ()),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "said", "verdict", "freed", "posted"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_each_difference_has_its_verdict_and_its_proposal(
    rows: list[LedgerRow], said: UsageDay, verdict: str, freed: tuple[str, ...], posted: tuple[tuple[str, Amounts], ...]
) -> None:
    (found,) = compared(rows, said)
    assert (found.verdict, found.may_be_freed, found.may_be_posted) == (verdict, freed, posted)


def test_the_figures_of_both_sides_are_there() -> None:
    (found,) = compared([row("a"), doubt("d")], theirs(400, 40 * CENT))
    assert (found.day, found.model) == (DAY, "open-mistral-7b")
    assert (found.tokens, found.nusd) == (300, 30 * CENT)
    assert (found.ours.sure, found.ours.unsure) == (Amounts(10 * CENT, 1, 100), Amounts(100 * CENT, 1, 1_000))
    assert compared([row("a")], theirs(100))[0].nusd is None


def test_what_is_posted_as_proposed_is_equal_afterwards() -> None:
    (found,) = compared([row("a"), doubt("d")], theirs(400, 40 * CENT))
    ((_, cost),) = found.may_be_posted
    settled = LedgerRow(
        id="d", at_ms=row("d").at_ms, env="dev", on=row("d").on, amounts=cost, state="posted", basis="manual"
    )
    assert compared([row("a"), settled], theirs(400, 40 * CENT))[0].verdict == "equal"


def test_nothing_is_proposed_about_today() -> None:
    rows = [row("a"), doubt("d")]
    assert compared(rows, theirs(100), today="2026-11-21")[0].may_be_freed == ("d",)
    for cost in (100, 400):
        (found,) = compared(rows, theirs(cost, cost * CENT // 10), today=DAY)
        assert found.verdict == "explained by doubt"
        assert not found.may_be_freed + found.may_be_posted


def test_only_days_the_provider_covers_are_compared() -> None:
    rows = [row("a", at="2026-11-18T23:59:59"), row("b", at="2026-11-19T00:00:00"), row("c", at="2026-11-21T00:00:00")]
    assert compared(rows) == []
    found = compared(rows, UsageDay("2026-11-19", ""), theirs(0, day="2026-11-20"))
    assert [(difference.day, difference.verdict) for difference in found] == [
        ("2026-11-19", "unexplained"),
        ("2026-11-20", "equal"),
    ]


def test_what_is_no_call_of_theirs_is_left_out() -> None:
    rows = [
        row("void", state="void"), row("released", state="released"), row("invoice", model=""),
        row("lease", state="in_doubt", source="lease"),
    ]  # fmt: skip
    assert booked_days(rows) == []
    mixed = [row("a"), row("b", model="openai/gpt-4o"), row("c", model="open-mistral-7b")]
    assert [(day.upstream, day.model) for day in booked_days(mixed)] == [
        ("openai", "gpt-4o"),
        ("mistral", "open-mistral-7b"),
    ]
    assert [day.upstream for day in booked_days(mixed, upstream="mistral")] == ["mistral"]


def test_the_silence_of_one_provider_frees_no_doubt_about_another() -> None:
    rows = [row("d", model="openai/gpt-4o", state="in_doubt"), row("a"), doubt("e")]
    for upstream in ("", "mistral"):
        found = compared(rows, theirs(100), upstream=upstream)
        assert [(difference.model, difference.may_be_freed) for difference in found] == [("open-mistral-7b", ("e",))]
    # Where nothing that was counted tells whose figures these are, nothing of ours is compared.
    assert compared([doubt("e")], UsageDay(DAY, ""), upstream="") == []
    assert [found.may_be_freed for found in compared([doubt("e")], UsageDay(DAY, ""))] == [("e",)]


def test_where_two_upstreams_serve_the_model_nothing_is_proposed() -> None:
    rows = [row("a"), row("d", model="vllm/open-mistral-7b", state="in_doubt")]
    (found,) = compared(rows, theirs(100), upstream="")
    assert (found.verdict, found.may_be_freed) == ("explained by doubt", ())
    assert [found.may_be_freed for found in compared(rows, theirs(0), upstream="vllm")] == [("d",)]


@pytest.mark.parametrize(
    ("ours", "counted", "is_matched"),
    [
        ("openai/gpt-4o", [UsageDay(DAY, "gpt-4o-2024-08-06", 25, 75)], True),
        ("mistral/mistral-small-latest", [UsageDay(DAY, "mistral-small-2506", 25, 75)], True),
        ("mistral/small", [UsageDay(DAY, "mistral-small-2506", 25, 75, aliases=("small",))], True),
        ("openai/gpt-4o", [UsageDay(DAY, "gpt-4o-mini-2024-07-18", 25, 75)], False),
        ("openai/gpt-4", [UsageDay(DAY, "gpt-4o-2024-08-06", 25, 75)], False),
        # Which of the two it was then, nobody can tell.
        ("openai/gpt-4o", [UsageDay(DAY, "gpt-4o-2024-08-06", 25, 75), UsageDay(DAY, "gpt-4o-2024-11-20", 1)], False),
    ],
)
def test_an_alias_is_matched_with_the_one_version_that_was_counted(
    ours: str, counted: list[UsageDay], is_matched: bool
) -> None:
    found = compared([row("a", model=ours)], *counted, upstream=ours.partition("/")[0])
    assert ("equal" in [difference.verdict for difference in found]) == is_matched
    if is_matched:
        assert found[0].booked_as == (ours.partition("/")[2],)


def test_names_that_are_told_go_before_those_that_are_guessed() -> None:
    days = [UsageDay(DAY, "ft:one", 50, 150)]
    rows = [row("a", model="mistral/x"), row("b", model="mistral/ft:one")]
    assert [found.verdict for found in reconcile(booked_days(rows), days, today=TODAY)] == [
        "unexplained",
        "unexplained",
    ]
    (found,) = reconcile(booked_days(rows), days, today=TODAY, names={"x": "ft:one"})
    assert (found.verdict, found.booked_as) == ("equal", ("x",))


def test_a_call_at_midnight_evens_out_over_all_days() -> None:
    rows = [row("a"), row("late", at=f"{DAY}T23:59:59"), row("b", at="2026-11-21T12:00:00")]
    found = compared(rows, theirs(100), theirs(200, day="2026-11-21"), today="2026-11-22")
    assert [difference.verdict for difference in found] == ["unexplained", "unexplained"]
    (whole,) = over_all_days(found)
    assert (whole.day, whole.verdict, whole.tokens) == ("2026-11-20/2026-11-21", "equal", 0)


def test_over_all_days_nothing_is_proposed() -> None:
    (whole,) = over_all_days(compared([doubt("d")], theirs(0)))
    assert (whole.verdict, whole.may_be_freed) == ("explained by doubt", ())


def test_nothing_is_freed_on_a_day_on_which_they_counted_what_we_cannot_explain() -> None:
    """It may be the doubt itself, under a name of theirs that ours was not matched with."""
    rows = [row("d", model="openai/gpt-4o", state="in_doubt", tokens=1_000)]
    one, other = UsageDay(DAY, "gpt-4o-2024-08-06", 10, 5), UsageDay(DAY, "gpt-4o-2024-11-20", 10, 5)
    found = compared(rows, one, other, upstream="openai")
    assert {difference.verdict for difference in found} == {"explained by doubt", "unexplained"}
    assert not any(difference.may_be_freed for difference in found)
    # On another day it is no hindrance.
    found = compared(rows, UsageDay(DAY, ""), one._replace(day="2026-11-19"), upstream="openai")
    assert any(difference.may_be_freed for difference in found)


@pytest.mark.parametrize(
    ("next_day", "freed"),
    [
        ([], ()),
        ([UsageDay("2026-11-21", "")], ("late",)),
        ([UsageDay("2026-11-21", "other", 5)], ()),
        ([theirs(100, day="2026-11-21")], ("late",)),
        ([theirs(101, day="2026-11-21")], ()),
    ],
)
def test_a_doubt_of_the_last_hour_is_freed_once_the_next_day_is_told(
    next_day: list[UsageDay], freed: tuple[str, ...]
) -> None:
    late = row("late", at=f"{DAY}T23:00:00", state="in_doubt")
    rows = [late] if not next_day or not next_day[0].prompt_tokens else [late, row("b", at="2026-11-21T12:00:00")]
    found = compared(rows, UsageDay(DAY, ""), *next_day, today="2026-11-22")
    assert found[0].may_be_freed == freed


@given(
    sure=st.lists(st.integers(0, 500), max_size=4),
    doubts=st.lists(st.tuples(st.integers(1, 500), st.booleans()), max_size=4),
)
def test_what_the_provider_billed_is_never_proposed_to_be_freed(
    sure: list[int], doubts: list[tuple[int, bool]]
) -> None:
    """Doubts that were billed were billed some tokens; whatever is proposed leaves at least that booked."""
    rows = [row(f"s{n}", tokens=tokens, nusd=tokens) for n, tokens in enumerate(sure)]
    rows += [doubt(f"d{n}", tokens, tokens) for n, (tokens, _) in enumerate(doubts)]
    billed = {f"d{n}": tokens for n, (tokens, was_billed) in enumerate(doubts) if was_billed}
    total = sum(sure) + sum(billed.values())
    (found,) = compared(rows, UsageDay(DAY, "open-mistral-7b", total, 0, total)) or [None]
    assert found is not None
    assert found.verdict in ("equal", "explained by doubt")
    assert not billed.keys() & set(found.may_be_freed)
    assert all(cost.tokens >= billed.get(id, 0) for id, cost in found.may_be_posted)


def test_no_ledger_at_all_is_their_figures_alone() -> None:
    (found,) = compared([], theirs(100, CENT))
    assert (found.ours, found.verdict) == (BookedDay(DAY, "open-mistral-7b"), "unexplained")
