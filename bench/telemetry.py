"""`python -m bench.telemetry`: what being seen from outside costs a call, in µs, without sockets around it.

Metrics, trace context, the name of the call in log lines: first as most calls have it, with nobody exporting; then with
metrics and traces exported and the call not sampled; then for one that is. The least of several rounds is told.
"""

import os
import time
import tomllib
from collections.abc import Callable
from random import Random

import click
from msgspec import Raw
from multidict import CIMultiDict, CIMultiDictProxy

from bench.gateway_files import CONFIG, POLICY
from bench.money import ON, call_of
from gateway.decide.plan import Plan, compile_plan
from gateway.decide.standing import Standing
from gateway.domain.policy import Breakers, Policy, Retries
from gateway.domain.reading import read_struct
from gateway.domain.rules import Routing
from gateway.domain.settings import Settings, Telemetry
from gateway.edge.call_trace import CallTrace
from gateway.telemetry.gen_ai import Operations
from gateway.telemetry.logs import IN_CALL
from gateway.telemetry.observe import Observer
from gateway.telemetry.tracing import Tracing

# As openai's SDK sends them.
_ORDINARY = {
    "Host": "127.0.0.1:8080", "Accept": "application/json", "Content-Type": "application/json",
    "User-Agent": "OpenAI/Python", "Authorization": "Bearer any", "x-stainless-lang": "python",
    "x-stainless-read-timeout": "600", "x-gateway-user": "u-4711", "Content-Length": "2048",
}  # fmt: skip
_PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-"
_FIELDS = {"messages": Raw(b'[{"role":"user","content":"hello"}]'), "max_tokens": Raw(b"64")}


def measure(rounds: int, calls: int) -> list[tuple[str, float]]:
    """Each case's figure in µs a call."""
    cases: list[tuple[str, Callable[[], object]]] = [
        ("nobody exports", _call(ratio=None)),
        ("... and the caller is in a trace", _call(ratio=None, parent=f"{_PARENT}01")),
        ("exported, not sampled", _call(ratio=0.0)),
        ("... by the caller's decision", _call(ratio=0.0, parent=f"{_PARENT}00")),
        ("exported and sampled", _call(ratio=1.0)),
    ]
    return [(name, _least(step, rounds, calls)) for name, step in cases]


def _least(step: Callable[[], object], rounds: int, calls: int) -> float:
    times = []
    for _ in range(rounds):
        since_ns = time.perf_counter_ns()
        for _ in range(calls):
            step()
        times.append((time.perf_counter_ns() - since_ns) / calls / 1000)
    return min(times)


def _plan() -> Plan:
    text = CONFIG.substitute(
        host="127.0.0.1", data_port=0, admin_port=1, mock_port=2, dir="unused", fast_agent="qa_agent",
        paced_agent="paced", paced="paced",
    )  # fmt: skip
    settings = read_struct(Settings, tomllib.loads(text), "", [])
    policy = read_struct(Policy, tomllib.loads(POLICY), "", [])
    if settings is None or policy is None:
        raise AssertionError("BUG: the bench's own configuration is wrong")
    return compile_plan("production", settings, policy, Routing(default_agent="qa_agent"), {})


def _call(*, ratio: float | None, parent: str = "") -> Callable[[], object]:
    """All that telemetry does in one plain call; `ratio` of None: nothing is exported."""
    plan = _plan()
    observer = Observer(plan, Standing(Breakers(), Retries()), tuple(Telemetry().latency_buckets_ms))
    tracing = Tracing(Random(7))
    if ratio is not None:
        observer.take_operations(Operations(plan))
        tracing.export_to(lambda _: None, ratio=ratio, is_parent_based=True)
    headers = CIMultiDictProxy(CIMultiDict(_ORDINARY | ({"traceparent": parent} if parent else {})))
    record = call_of(1)[2]
    record.attempts[0].ref = record.model_sent = "mock/fast-finetuned"

    def step() -> None:
        IN_CALL.set(record)
        trace = CallTrace(tracing)
        trace.begin(headers, record, is_trusted=True)
        trace.asks(_FIELDS, max_chars=0)
        trace.sent(trace.span_id(), "trace")
        observer.call_ended(record)
        trace.end(record)
        IN_CALL.set(None)

    return step


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rounds", type=click.IntRange(1, 100), default=7, show_default=True)
@click.option("--calls", type=click.IntRange(100, 1_000_000), default=20_000, show_default=True)
def main(rounds: int, calls: int) -> None:
    """Measure what metrics, traces and ids in the log cost a call."""
    for name, us in measure(rounds, calls):
        click.echo(f"{name:<38} {us:6.2f} µs")
    click.echo(f"({os.cpu_count()} cores, least of {rounds} rounds; agent {ON.agent})")


if __name__ == "__main__":
    main()
