"""Looks at experiments in a process of their own: what is asked comes in on stdin, what was found goes out on stdout.

A comparison computes for seconds, and a thread that computes makes every call of its process wait for its turn: with
20,000 users in an experiment p99 went from 22 to 173 ms. So a gateway that serves never compares in its own process;
edge/looking.py starts this one. It knows no clock and writes nothing. The invariant: one answer, whole, or none.
"""

import os
import sys
from pathlib import Path

import msgspec

from gateway.decide.rollout_evidence import Look
from gateway.decide.rollout_plan import RolloutPlan
from gateway.domain.rollout import RolloutState
from gateway.store.experiments import Experiments
from gateway.store.looks import look_at
from gateway.store.store import StoreError

# Calls come first where processors are few.
_NICENESS = 10


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """At which rollouts of which store to look; times are unix ms."""

    store: str
    env: str
    now_ms: int
    rollouts: tuple[tuple[RolloutState, RolloutPlan], ...]


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A look at each, in the same order; or why there is none: the store's own words."""

    looks: tuple[Look, ...] = ()
    error: str = ""


def answer(asked: Asked) -> Found:
    """Look at all of them."""
    try:
        with Experiments(Path(asked.store), clock=lambda: asked.now_ms / 1000, is_new_allowed=False) as experiments:
            looks = tuple(
                look_at(experiments, asked.env, state, plan, now_ms=asked.now_ms) for state, plan in asked.rollouts
            )
    except StoreError as error:
        return Found(error=str(error))
    return Found(looks=looks)


def main() -> None:
    """Serve one request."""
    os.nice(_NICENESS)
    asked = msgspec.json.decode(sys.stdin.buffer.read(), type=Asked)
    sys.stdout.buffer.write(msgspec.json.encode(answer(asked)))


if __name__ == "__main__":
    main()
