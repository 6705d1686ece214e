"""Whether users arrive in the arms in the shares they were assigned in: a sequential test for sample-ratio mismatch.

Counts users, never calls, whose number the treatment may change. Its one invariant: as long as assignment and
recording are sound, the e-value ever reaches x with probability 1/x at most, however often it is looked at. Sound
means that a user's arrival is seen whichever the arm: so those are counted whose calls began so long ago that they
must have ended, or the slower arm's would be missing.
Lindon and Malek 2022, "Anytime-valid inference for multinomial count data": a Beta mixture against the known share.
"""

from collections.abc import Iterable
from math import exp, lgamma, log

from gateway.decide.assign import BUCKETS
from gateway.domain.experiment import Arrivals, Mismatch

# The prior is worth as many users: it expects a mismatch of a tenth of the share at 50 %, of a third at 10 %.
_PRIOR_USERS = 100.0
_MAX_LOG = 690.0


def chance_of(share_bps: int, earlier: Iterable[tuple[int, bool]]) -> float | None:
    """The chance that a user who comes into a stage of `share_bps` is treated there, given the earlier stages.

    `earlier`: for each stage in which this user was seen, its share and whether it was in the treated arm; each says
    of the user's bucket that it is below or not below that share. None where that settles it, or contradicts itself.
    """
    low, high = 0, BUCKETS
    for share, is_treated in earlier:
        if is_treated:
            high = min(high, share)
        else:
            low = max(low, share)
    return (share_bps - low) / (high - low) if low < share_bps < high else None


def mismatch_of(arrivals: Iterable[Arrivals], *, alpha: float = 0.001) -> Mismatch:
    """The evidence so far. Found once the e-value reaches 1/alpha: with a false alarm in 1/alpha experiments at most.

    Each user is a draw whose chance is known from the past, so the strata's e-values multiply. Rows of the same
    stratum and share add up. Arrivals that could not be otherwise (a share of 0 or 1) say nothing.
    """
    merged: dict[tuple[str, float], tuple[int, int]] = {}
    for stratum, share, treated, control in arrivals:
        if 0 < share < 1 and treated + control > 0:
            before = merged.get((stratum, share), (0, 0))
            merged[stratum, share] = (before[0] + treated, before[1] + control)
    users = sum([treated + control for treated, control in merged.values()])
    if not users:
        return Mismatch(is_found=False, e_value=1.0, expected_share=None, seen_share=None, users=0)
    log_e = sum([_log_e(share, treated, control) for (_, share), (treated, control) in sorted(merged.items())])
    expected = sum([share * (treated + control) for (_, share), (treated, control) in sorted(merged.items())])
    return Mismatch(
        is_found=log_e >= -log(alpha),
        e_value=exp(max(-_MAX_LOG, min(_MAX_LOG, log_e))),
        expected_share=expected / users,
        seen_share=sum([treated for treated, _ in merged.values()]) / users,
        users=users,
    )


def _log_e(share: float, treated: int, control: int) -> float:
    a, b = _PRIOR_USERS * share, _PRIOR_USERS * (1 - share)
    marginal = _log_beta(a + treated, b + control) - _log_beta(a, b)
    return marginal - treated * log(share) - control * log(1 - share)


def _log_beta(a: float, b: float) -> float:
    return lgamma(a) + lgamma(b) - lgamma(a + b)
