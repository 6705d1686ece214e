"""Calls for tests of what is counted of them: one by hand, and many drawn as gateways make them."""

from hypothesis import strategies as st

from gateway.domain.call import Attempt, CallRecord
from gateway.domain.money import Usage
from gateway.domain.outcome import Feedback, Outcome

AT_MS = 1_795_262_400_000
# Of the users' own buckets, and of the shares that the stages had.
BUCKETS = {"u1": 0, "u2": 999, "u3": 1_000, "u4": 2_499, "u5": 6_000, "u6": 9_999}
SHARES = {1: 1_000, 2: 2_500, 3: 1_000, 4: 10_000}


def outcome(id: str = "c1", **changes: object) -> Outcome:
    """A treated call of the first experiment that went well."""
    return Outcome(
        id=id, at_ms=AT_MS, env="dev", agent="qa_agent", experiment=1, stage=1, share_bps=1_000, variant="finetuned",
        bucket=0, user="u1", key="web", operation="inference", model="first/ft:a", is_success=True, is_fallback=False,
        error="", latency_ms=812.4, first_chunk_ms=None, cost_nusd=240_000, prompt_tokens=100, completion_tokens=200,
    )._replace(**changes)  # type: ignore[arg-type]  # fmt: skip


def record(id: str = "c1", **changes: object) -> CallRecord:
    """The record whose outcome is `outcome(id)`."""
    fields: dict[str, object] = {
        "at_ms": AT_MS, "env": "dev", "agent": "qa_agent", "experiment": 1, "stage": 1, "share_bps": 1_000,
        "variant": "finetuned", "bucket": 0, "user": "u1", "key": "web", "model_sent": "first/ft:a", "status": 200,
        "attempts": [Attempt(ref="first/ft:a", started_ms=AT_MS, status=200, cost_nusd=240_000)],
        "usage": Usage(prompt_tokens=100, completion_tokens=200), "duration_ms": 812.4,
    }  # fmt: skip
    return CallRecord(id=id, **(fields | changes))  # type: ignore[arg-type]


# Environment, agent, experiment, and whether it went well: most of them count in the comparison that is looked at.
_KINDS = (
    *(("dev", "qa_agent", 1, is_success) for is_success in (True, True, False, None)),
    ("dev", "qa_agent", 2, True),
    ("dev", "qa_agent", 0, True),
    ("dev", "legal_agent", 1, False),
    ("production", "qa_agent", 1, True),
)
_CALLS = st.lists(
    st.tuples(
        st.sampled_from([*BUCKETS, ""]),
        st.sampled_from(list(SHARES)),
        st.integers(0, 20),
        st.sampled_from(_KINDS),
        st.integers(0, 10**9),
    ),
    max_size=25,
)


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Outcome], list[Feedback]]:
    """Calls in any order of time, some of which count in no comparison, and feedback, some of it said anew."""
    calls = [_call(f"c{number}", *drawn) for number, drawn in enumerate(draw(_CALLS))]
    said = st.builds(
        Feedback,
        call_id=st.sampled_from([call.id for call in calls] or ["none"]),
        caller=st.sampled_from(["web", "batch"]),
        at_ms=st.just(AT_MS),
        score=st.floats(-1, 1),
        label=st.just(""),
    )
    return calls, draw(st.lists(said, max_size=8))


def _call(
    id: str, user: str, stage: int, after_ms: int, kind: tuple[str, str, int, bool | None], number: int
) -> Outcome:
    """A call in the arm that its user's bucket is in; what else is to be told apart follows from `number`."""
    env, agent, experiment, is_success = kind
    bucket = BUCKETS.get(user)
    return outcome(
        id, at_ms=AT_MS + after_ms, env=env, agent=agent, experiment=experiment, stage=stage, share_bps=SHARES[stage],
        variant="finetuned" if bucket is not None and bucket < SHARES[stage] else "baseline", bucket=bucket, user=user,
        is_success=is_success, is_fallback=number % 3 == 0, error="upstream_timeout" if number % 5 == 0 else "",
        latency_ms=number / 1000, first_chunk_ms=number / 2000 if number % 2 == 0 else None, cost_nusd=number * 1_000,
        prompt_tokens=number % 100, completion_tokens=number % 1_000,
    )  # fmt: skip
