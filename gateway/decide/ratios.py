"""A ratio of sums in either arm, such as successes per call, and how uncertain it is.

The unit is the user, who was assigned, not the call: a user's calls resemble each other. Arms are compared within a
stage, where the share is one, and the stages are put together with weights that depend on the numbers of calls only
(Mantel and Haenszel 1959). Knows no verdicts. Its one invariant: swapping the arms swaps the answer.
"""

from collections.abc import Callable, Hashable, Mapping
from math import fsum
from typing import NamedTuple

from gateway.decide.intervals import MIN_FREEDOM
from gateway.domain.experiment import UserSums

# In each stage the users of the control and of the treated arm, by name, at index 0 and 1.
Arms = tuple[dict[str, UserSums], dict[str, UserSums]]
Strata = Mapping[Hashable, Arms]
# What of a user's row counts: (how many, their sum).
Read = Callable[[UserSums], tuple[float, float]]


class Contrast(NamedTuple):
    """The value of each arm, and the variances that the difference and the ratio follow from.

    `freedom`: the degrees of freedom of the difference's variance. `effective`: as many equally busy users would give
    the smaller arm as much. `weights`: what each stage counts, adding up to 1; a stage without two users in
    both arms is not in it. Pairs are (control, treated).
    """

    values: tuple[float, float]
    variances: tuple[float, float]
    covariance: float
    freedom: float
    users: tuple[int, int]
    calls: tuple[int, int]
    effective: float
    weights: Mapping[Hashable, float]

    @property
    def difference(self) -> float:
        """Treated minus control."""
        return self.values[1] - self.values[0]

    def variance(self, ratio: float = 1.0) -> float:
        """The variance of treated - ratio * control. A user who was moved between the arms is in both."""
        return max(0.0, self.variances[1] - 2 * ratio * self.covariance + ratio * ratio * self.variances[0])


class _Cell(NamedTuple):
    """One arm in one stage."""

    users: list[tuple[str, float, float]]
    calls: float
    total: float


def contrast(strata: Strata, read: Read, *, scale: float | None = None) -> Contrast | None:
    """Compare the arms. None where no stage has two users in both.

    `scale` is how far two calls can be apart; by default as far as the mean is from zero. It is needed only where all
    calls are equal, when data do not tell.
    """
    cells = {stage: (_cell(arms[0], read), _cell(arms[1], read)) for stage, arms in strata.items()}
    cells = {stage: pair for stage, pair in cells.items() if min(len(pair[0].users), len(pair[1].users)) >= 2}
    if not cells:
        return None
    weights = {stage: c.calls * t.calls / (c.calls + t.calls) for stage, (c, t) in cells.items()}
    whole = fsum(weights.values())
    weights = {stage: weight / whole for stage, weight in weights.items()}
    arms = (_Arm(), _Arm())
    for stage, pair in cells.items():
        for arm, cell in zip(arms, pair, strict=True):
            arm.add(cell, weights[stage])
    return _contrast(arms, weights, scale)


def _cell(rows: Mapping[str, UserSums], read: Read) -> _Cell:
    users = []
    for user, row in rows.items():
        calls, total = read(row)
        if calls > 0:
            users.append((user, calls, total))
    return _Cell(users, fsum([calls for _, calls, _ in users]), fsum([total for _, _, total in users]))


class _Arm:
    """One arm over all stages: its value, and how much each user moves it."""

    def __init__(self) -> None:
        self.value = 0.0
        self.calls = 0.0
        self.influence: dict[str, float] = {}
        self._busyness: dict[str, float] = {}

    def add(self, cell: _Cell, weight: float) -> None:
        ratio = cell.total / cell.calls
        self.value += weight * ratio
        self.calls += cell.calls
        influence, busyness = self.influence, self._busyness
        for user, calls, total in cell.users:
            # What leaving this user out would change: the linearised influence, raised by the user's own leverage.
            influence[user] = influence.get(user, 0.0) + weight * (total - ratio * calls) / (cell.calls - calls)
            busyness[user] = busyness.get(user, 0.0) + weight * calls / cell.calls

    @property
    def effective(self) -> float:
        """As many equally busy users would give as much (Kish 1965)."""
        return 1 / fsum([part * part for part in self._busyness.values()])


def _contrast(arms: tuple[_Arm, _Arm], weights: Mapping[Hashable, float], scale: float | None) -> Contrast:
    squares = tuple([[value * value for value in arm.influence.values()] for arm in arms])
    sums = tuple([fsum(values) for values in squares])
    fourths = tuple([fsum([value * value for value in values]) for values in squares])
    extras = _one_more_user(arms, sums, fourths, scale)
    control, treated = arms[0].influence, arms[1].influence
    both = control.keys() & treated.keys()
    covariance = fsum([control[user] * treated[user] for user in both])
    fourth = fsum(fourths) + extras[0] ** 2 + extras[1] ** 2
    for user in both:
        fourth += (treated[user] - control[user]) ** 4 - treated[user] ** 4 - control[user] ** 4
    variances = (sums[0] + extras[0], sums[1] + extras[1])
    variance = variances[0] + variances[1] - 2 * covariance
    # Satterthwaite's (1946) with fourth moments: as for rare failures, few users may carry all of the variance.
    freedom = 2 * variance * variance / fourth if fourth > 0 else MIN_FREEDOM
    return Contrast(
        values=(arms[0].value, arms[1].value),
        variances=variances,
        covariance=covariance,
        freedom=max(MIN_FREEDOM, freedom),
        users=(len(control), len(treated)),
        calls=(round(arms[0].calls), round(arms[1].calls)),
        effective=min(arms[0].effective, arms[1].effective),
        weights=weights,
    )


def _one_more_user(
    arms: tuple[_Arm, _Arm], sums: tuple[float, ...], fourths: tuple[float, ...], scale: float | None
) -> tuple[float, float]:
    """The squared influence of one more user in each arm, like those who carry its variance.

    Without it, an arm in which nothing has failed yet would be certain that nothing ever will. Such an arm borrows
    from the other; where that has no spread either, one more user may be as bad as can be, which is the rule of three.
    """
    own = [fourth / total if total > 0 else 0.0 for fourth, total in zip(fourths, sums, strict=True)]
    extras = []
    for index, arm in enumerate(arms):
        other = 1 - index
        if own[index] > 0:
            extras.append(own[index])
        elif own[other] > 0:
            extras.append(own[other] * (arms[other].calls / arm.calls) ** 2)
        else:
            step = abs(arm.value) if scale is None else scale
            extras.append((step / len(arm.influence)) ** 2)
    return extras[0], extras[1]
