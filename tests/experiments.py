"""Rows of experiments for tests: drawn by hypothesis, or from a seed."""

from hypothesis import strategies as st
from numpy.random import Generator

from gateway.domain.experiment import UserSums, bucket_of_ms


@st.composite
def user_sums(draw: st.DrawFn, users: int = 12) -> UserSums:
    """One row that a store could give."""
    calls = draw(st.integers(0, 30))
    latencies = draw(st.lists(st.floats(0.1, 60_000), min_size=calls, max_size=calls))
    scores = draw(st.integers(0, calls))
    return UserSums(
        user=f"u{draw(st.integers(1, users))}",
        stage=draw(st.sampled_from(["qa_agent/1", "qa_agent/2", "legal_agent/1"])),
        is_treated=draw(st.booleans()),
        calls=calls,
        successes=draw(st.integers(0, calls)),
        latency_ms=sum(latencies),
        cost_nusd=draw(st.integers(0, 10**12)) if calls else 0,
        scores=scores,
        score_sum=draw(st.floats(-scores, scores)),
        latencies=histogram(latencies),
    )


def histogram(latencies: list[float]) -> dict[int, int]:
    """Calls by cell of the grid."""
    counts: dict[int, int] = {}
    for ms in latencies:
        cell = bucket_of_ms(ms)
        counts[cell] = counts.get(cell, 0) + 1
    return counts


def drawn(
    random: Generator,
    *,
    users: int = 300,
    stages: tuple[int, ...] = (5000,),
    calls: float = 10,
    success: tuple[float, float] = (0.9, 0.9),
    slower: float = 1.0,
    dearer: float = 1.0,
    happier: float = 0.0,
) -> list[UserSums]:
    """An experiment whose users differ in how busy, lucky and slow they are. `success` is (control, treated)."""
    rows = []
    for user in range(users):
        bucket, habit, luck = random.integers(10_000), random.normal(0, 0.4), random.beta(9, 1) / 0.9
        for number, share in enumerate(stages):
            is_treated = bool(bucket < share)
            count = 1 + int(random.geometric(1 / calls))
            latencies = 1000 * random.lognormal(habit, 0.5, count) * (slower if is_treated else 1)
            scores = int(random.binomial(count, 0.5))
            rows.append(
                UserSums(
                    user=f"u{user}",
                    stage=str(number),
                    is_treated=is_treated,
                    calls=count,
                    successes=int(random.binomial(count, min(1.0, luck * success[is_treated]))),
                    latency_ms=float(latencies.sum()),
                    cost_nusd=int(100_000 * count * random.lognormal(0, 0.3) * (dearer if is_treated else 1)),
                    scores=scores,
                    score_sum=float(random.uniform(-1, 1, scores).sum() + (happier * scores if is_treated else 0)),
                    latencies=histogram(latencies.tolist()),
                )
            )
    return rows
