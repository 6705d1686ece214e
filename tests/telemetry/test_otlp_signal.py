"""One signal's exports: each in a thread, one warning per outage, and a bug that is told as one."""

import asyncio
import threading
from typing import Any

import pytest
from prometheus_client import generate_latest

from gateway.decide.standing import Standing
from gateway.domain.policy import Breakers, Retries
from gateway.telemetry.exposition import Snapshot
from gateway.telemetry.observe import Observer
from gateway.telemetry.otlp_exporter import Exporter, Listening
from gateway.telemetry.otlp_signal import SignalExport
from tests.planning import plan_of


class _Result:
    def __init__(self, name: str) -> None:
        self.name = name


class _Scripted:
    """An exporter that takes or refuses, and tells in which thread it was asked."""

    def __init__(self, *names: str) -> None:
        self._names = list(names)
        self.threads: list[str] = []
        self.data: list[Any] = []

    def export(self, data: Any) -> _Result:
        self.threads.append(threading.current_thread().name)
        self.data.append(data)
        return _Result(self._names.pop(0))

    def shutdown(self) -> None:
        self.threads.append("down")


def made(exporter: _Scripted, *, late_s: float = 60.0) -> tuple[SignalExport, Observer]:
    observer = Observer(plan_of(), Standing(Breakers(), Retries()), (10, 100))
    listening = Listening()
    listening.end()
    return SignalExport("traces", Exporter(exporter, listening), observer, every_s=5.0, late_s=late_s), observer


async def test_an_outage_is_one_warning_and_one_line_when_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    exporter = _Scripted("FAILURE", "FAILURE", "SUCCESS", "SUCCESS", "FAILURE")
    signal, observer = made(exporter)
    assert b'gateway_otlp_exports_total{result="failed",signal="traces"} 0.0' in generate_latest(
        Snapshot(observer.figures())
    )
    outcomes = [await signal.send(lambda number=number: number) for number in range(5)]
    assert outcomes == [False, False, True, True, False]
    why = "it did not take them in time; every 5 s it is tried again"
    assert [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "gateway.otlp"] == [
        ("WARNING", f"traces are not exported over OTLP: {why}"),
        ("INFO", "traces are exported over OTLP again, after 2 that were not"),
        ("WARNING", f"traces are not exported over OTLP: {why}"),
    ]
    text = generate_latest(Snapshot(observer.figures())).decode()
    assert 'gateway_otlp_exports_total{result="failed",signal="traces"} 3.0' in text
    assert 'gateway_otlp_exports_total{result="ok",signal="traces"} 2.0' in text
    assert exporter.data == [0, 1, 2, 3, 4]
    signal.shutdown()
    assert set(exporter.threads) == {"otlp-traces", "down"}


class _Hangs(_Scripted):
    """An exporter whose collector takes its time, whatever the limit is."""

    def __init__(self, *names: str) -> None:
        super().__init__(*names)
        self.may_end = threading.Event()

    def export(self, data: Any) -> _Result:
        self.may_end.wait()
        return super().export(data)


async def test_a_collector_that_hangs_is_told_and_counted_while_it_does_and_gets_nothing_further(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    exporter, was_late = _Hangs("SUCCESS", "SUCCESS"), asyncio.Event()
    signal, observer = made(exporter, late_s=0.01)
    count = observer.exported

    def counting(name: str, *, ok: bool) -> None:
        count(name, ok=ok)
        if signal.failures == 2:
            was_late.set()

    monkeypatch.setattr(observer, "exported", counting)
    sending = asyncio.create_task(signal.send(list))
    await was_late.wait()
    assert [thread.name for thread in threading.enumerate()].count("otlp-traces") == 1
    exporter.may_end.set()
    assert await sending is True
    counted = observer._exports["traces", "failed"]
    assert counted >= 3
    assert await signal.send(list) is True
    said = [record.getMessage() for record in caplog.records if record.name == "gateway.otlp"]
    assert said == [
        "traces are not exported over OTLP: no answer within 0.01 s; every 5 s it is tried again",
        f"traces are exported over OTLP again, after {counted} that were not",
    ]
    text = generate_latest(Snapshot(observer.figures())).decode()
    assert f'gateway_otlp_exports_total{{result="failed",signal="traces"}} {counted}.0' in text
    assert 'gateway_otlp_exports_total{result="ok",signal="traces"} 2.0' in text


async def test_what_cannot_be_made_is_a_bug_told_once_and_the_next_is_tried(
    caplog: pytest.LogCaptureFixture,
) -> None:
    exporter = _Scripted("SUCCESS")
    signal, _ = made(exporter)

    def make() -> Any:
        raise ZeroDivisionError

    async with asyncio.timeout(10):
        assert [await signal.send(one) for one in (make, make, list)] == [False, False, True]
    (record,) = [record for record in caplog.records if record.name == "gateway.otlp" and record.levelname == "ERROR"]
    assert record.getMessage() == "bug in the traces for OTLP: ZeroDivisionError"
    assert record.exc_info is not None
    assert exporter.data == [[]]
