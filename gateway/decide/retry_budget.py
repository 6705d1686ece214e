"""How many retries an upstream can bear: a share of its recent calls, so that a brown-out is not amplified.

Pure: `now_s` is passed in. The invariant: within any window, retries never exceed `share` of the calls plus `floor`.
"""

from collections import deque


class RetryBudget:
    """One upstream's budget. Counts in slices of a second, so memory does not grow with traffic."""

    __slots__ = ("_calls", "_floor", "_retries", "_share", "_window_s")

    def __init__(self, *, share: float, floor: int, window_s: float) -> None:
        self._share = share
        self._floor = floor
        self._window_s = window_s
        self._calls: deque[list[float]] = deque()
        self._retries: deque[list[float]] = deque()

    def called(self, now_s: float) -> None:
        """A first attempt was made."""
        _count(self._calls, now_s)

    def take(self, now_s: float) -> bool:
        """Take a retry out of the budget, if there is one."""
        if self.left(now_s) < 1:
            return False
        _count(self._retries, now_s)
        return True

    def left(self, now_s: float) -> float:
        """Retries that could be made now."""
        calls = _sum(self._calls, now_s - self._window_s)
        retries = _sum(self._retries, now_s - self._window_s)
        # Calls may leave the window before the retries they allowed.
        return max(0.0, max(float(self._floor), self._share * calls) - retries)


def _count(slices: deque[list[float]], now_s: float) -> None:
    second = float(int(now_s))
    if slices and slices[-1][0] >= second:
        slices[-1][1] += 1
    else:
        slices.append([second, 1])


def _sum(slices: deque[list[float]], since_s: float) -> float:
    # A slice counts until its last call is out of the window.
    while slices and slices[0][0] + 1 <= since_s:
        slices.popleft()
    return sum(count for _, count in slices)
