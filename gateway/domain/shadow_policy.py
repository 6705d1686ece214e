"""The shape of a policy's [shadow] section: which calls are also sent to the other variant, and what that may cost.

Not how it is done (edge/shadow.py). The invariant: what `check_shadow` passes has a cap of its own, or sends nothing.
"""

from collections.abc import Collection, Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from gateway.domain.reading import Problem, Usd, nearest
from gateway.domain.rollout_policy import Percent

# The operation that shadow calls are booked under. No caller may use it, and only caps that name it count it.
SHADOW = "shadow"
# Shadows take connections from the pools that calls use: at most one in so many of the smallest pool.
POOL_PARTS = 4


class Shadow(msgspec.Struct, frozen=True, kw_only=True):
    """`percent` of the calls of `agents` (none named: all), for at most `usd` per window; 0: none.

    `max_in_flight`: so many at once in a process; what would be more is left out.
    """

    percent: Percent = 0.0
    agents: list[str] = []
    usd: Usd | None = None
    per: Literal["hour", "day", "month", "total"] = "day"
    max_in_flight: Annotated[int, Meta(ge=1, le=1_000)] = 4

    @property
    def is_on(self) -> bool:
        """Whether any call has a shadow."""
        return self.percent > 0

    def covers(self, agent: str) -> bool:
        """Whether calls of this agent may have one."""
        return not self.agents or agent in self.agents


def check_shadow(shadow: Shadow, agents: Collection[str], pools: Mapping[str, int]) -> list[Problem]:
    """What the types cannot say. `pools`: how many connections each upstream may have."""
    problems = [
        Problem(
            key="shadow.agents",
            found=f'"{agent}"',
            fix=f"no such agent; known: {', '.join(sorted(agents))}{nearest(agent, agents)}",
        )
        for agent in shadow.agents
        if agent not in agents
    ]
    if not shadow.is_on:
        return problems

    def wrong(name: str, found: str, fix: str) -> None:
        problems.append(Problem(key=f"shadow.{name}", found=found, fix=fix))

    if shadow.usd is None:
        wrong("usd", "", 'wants what shadow calls may cost in a window, such as usd = "1.00"')
    elif shadow.usd == 0:
        wrong("usd", '"0"', "would let no shadow call through; percent = 0 says so")
    for upstream, connections in sorted(pools.items()):
        if shadow.max_in_flight * POOL_PARTS > connections:
            most = f"at most {connections // POOL_PARTS}" if connections >= POOL_PARTS else "none"
            fix = f"calls use the {connections} connections of upstreams.{upstream}, too; {most} may be for shadows"
            wrong("max_in_flight", str(shadow.max_in_flight), fix)
    return problems
