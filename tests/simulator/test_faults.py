"""Faults on demand: every name does what its line says, and a rate always picks the same requests."""

from typing import Any

import msgspec
import pytest

from gateway.domain.settings import SimulatorSettings
from gateway.simulator.chat import ChatRequest, RequestRefused, read_request
from gateway.simulator.faults import FAULTS, SLOW_FIRST_MS, Fault, fails, fault_of, reply_to, spoilt
from gateway.simulator.reply import DONE, Reply, good_reply

SETTINGS = SimulatorSettings(first_token_ms=0, per_token_ms=0)


def request(model: str = "m", **fields: Any) -> ChatRequest:
    return read_request({"model": model, "messages": [{"role": "user", "content": "refunds"}], **fields})


def spoil(name: str, **fields: Any) -> tuple[Reply, Reply]:
    """The good reply and the spoilt one for the same request."""
    asked = request(**fields)
    return good_reply(asked, SETTINGS, now_s=0), spoilt(name, asked, SETTINGS, now_s=0)


def kinds(reply: Reply) -> list[str]:
    return [part.kind for part in reply.parts]


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("stream", [False, True])
def test_every_fault_of_the_table_is_known_and_described(name: str, stream: bool) -> None:
    assert FAULTS[name].endswith(".")
    good, bad = spoil(name, stream=stream, **({"stream_options": {"include_usage": True}} if stream else {}))
    assert (bad == good) is (name == "no-done" and not stream)


@pytest.mark.parametrize(
    ("name", "status", "code"),
    [
        ("400-context", 400, "context_length_exceeded"),
        ("400-filter", 400, "content_filter"),
        ("401", 401, "invalid_api_key"),
        ("429", 429, "rate_limit_exceeded"),
        ("429-bare", 429, "rate_limit_exceeded"),
        ("429-quota", 429, "insufficient_quota"),
        ("500", 500, None),
        ("503", 503, None),
        ("error-in-200", 200, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_has_its_status_and_code(name: str, status: int, code: str | None, stream: bool) -> None:
    _, bad = spoil(name, stream=stream)
    assert bad.status == status
    assert bad.content_type == "application/json"
    assert msgspec.json.decode(bad.parts[0].data)["error"]["code"] == code
    assert bad.headers.get("retry-after") == ("2" if name == "429" else None)


def test_a_cut_stream_ends_after_two_thirds_and_a_stalled_one_after_half() -> None:
    good, cut = spoil("cut", stream=True)
    _, short = spoil("short", stream=True)
    _, stall = spoil("stall", stream=True)
    tokens = kinds(good).count("token")
    assert kinds(cut) == ["role"] + ["token"] * (tokens * 2 // 3)
    assert kinds(stall) == ["role"] + ["token"] * (tokens // 2)
    assert (cut.ending, short.ending, stall.ending) == ("cut", "whole", "held")
    assert short.parts == cut.parts


@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.parametrize("name", ["cut", "short", "stall"])
def test_even_a_tiny_stream_loses_its_last_token(name: str, limit: int) -> None:
    good, bad = spoil(name, stream=True, max_tokens=limit)
    assert kinds(bad).count("token") < kinds(good).count("token")
    assert not {"finish", "done"} & set(kinds(bad))
    nothing_said, held = spoil(name, stream=True, stop="This")
    assert kinds(held) == ["role"] != kinds(nothing_said)


def test_a_cut_body_is_shorter_than_declared_and_a_malformed_one_is_not() -> None:
    good, cut = spoil("cut")
    _, stall = spoil("stall")
    _, malformed = spoil("malformed")
    whole = len(good.parts[0].data)
    assert (len(cut.parts[0].data), cut.declared_bytes, cut.ending) == (whole * 2 // 3, whole, "cut")
    assert (len(stall.parts[0].data), stall.declared_bytes, stall.ending) == (whole // 2, whole, "held")
    assert malformed.declared_bytes == len(malformed.parts[0].data)
    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(malformed.parts[0].data)


def test_one_event_of_a_malformed_stream_is_not_json() -> None:
    good, bad = spoil("malformed", stream=True)
    odd = [part for part in bad.parts if part not in good.parts]
    assert len(odd) == 1
    assert bad.parts[-1].data == DONE
    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(odd[0].data[6:])


def test_an_error_in_the_stream_is_the_last_that_is_heard() -> None:
    _, bad = spoil("error-in-stream", stream=True)
    assert kinds(bad)[-1] == "error"
    assert msgspec.json.decode(bad.parts[-1].data[6:])["error"]["type"] == "server_error"
    assert not {"finish", "done"} & set(kinds(bad))


def test_usage_or_done_can_be_missing() -> None:
    asked = {"stream": True, "stream_options": {"include_usage": True}}
    assert "usage" not in kinds(spoil("no-usage", **asked)[1])
    assert kinds(spoil("no-done", **asked)[1])[-2:] == ["finish", "usage"]
    assert "usage" not in msgspec.json.decode(spoil("no-usage")[1].parts[0].data)


def test_nothing_may_be_sent_at_all() -> None:
    reset, silent = spoil("reset")[1], spoil("silent")[1]
    assert (reset.is_headless, reset.ending) == (True, "cut")
    assert (silent.is_headless, silent.ending) == (True, "held")
    empty = spoil("empty", stream=True)[1]
    assert (empty.status, empty.parts, empty.declared_bytes) == (200, (), 0)


def test_the_first_byte_may_be_slow() -> None:
    for stream in (False, True):
        good, bad = spoil("slow-first", stream=stream)
        assert bad.parts[0].wait_ms == SLOW_FIRST_MS
        assert [part.data for part in bad.parts] == [part.data for part in good.parts]


@pytest.mark.parametrize(
    ("model", "fault"),
    [
        ("simulator", None),
        ("ft:default:503", None),
        ("fault:503", Fault("503")),
        ("sim-fault:429-bare", Fault("429-bare")),
        ("simulator/qa_fault:cut", Fault("cut")),
        ("fault:503@0.2", Fault("503", 0.2)),
        ("fault:503@0", Fault("503", 0.0)),
        ("fault:503@1", Fault("503", 1.0)),
        ("fault:503@.5", Fault("503", 0.5)),
    ],
)
def test_the_model_id_names_the_fault(model: str, fault: Fault | None) -> None:
    assert fault_of(model) == fault


@pytest.mark.parametrize("model", ["fault:", "fault:504", "fault:503@", "fault:503@1.1", "fault:503@.", "fault:503x"])
def test_an_unknown_fault_or_rate_is_refused(model: str) -> None:
    with pytest.raises(RequestRefused):
        fault_of(model)
    assert reply_to(request(model), SETTINGS, now_s=0).status == 400


def test_the_refusal_lists_the_faults_there_are() -> None:
    body = reply_to(request("fault:504"), SETTINGS, now_s=0).parts[0].data
    message = msgspec.json.decode(body)["error"]["message"]
    assert all(name in message for name in FAULTS)


def test_a_rate_spoils_its_share_and_always_the_same_requests() -> None:
    def statuses() -> list[int]:
        return [reply_to(request("fault:503@0.2", seed=seed), SETTINGS, now_s=0).status for seed in range(1_000)]

    first = statuses()
    assert first == statuses()
    assert set(first) == {200, 503}
    # The requests are fixed, so this is no coin toss: 1,000 throws at 20 % stray by 13 (one sigma).
    assert 160 <= first.count(503) <= 240


def test_a_rate_of_none_never_and_a_rate_of_one_always_spoils() -> None:
    assert {reply_to(request("fault:503@0", seed=seed), SETTINGS, now_s=0).status for seed in range(50)} == {200}
    assert {reply_to(request("fault:503@1", seed=seed), SETTINGS, now_s=0).status for seed in range(50)} == {503}


@pytest.mark.parametrize("model, rate", [("ft:m", 0.3), ("m", 0.1)])
def test_a_kind_of_models_fails_at_its_rate_and_always_at_the_same_requests(model: str, rate: float) -> None:
    settings = SimulatorSettings(first_token_ms=40, jitter=0, finetuned_error_rate=0.3, baseline_error_rate=0.1)
    asked = [request(model=model, seed=seed) for seed in range(2_000)]
    failed = [reply_to(one, settings, now_s=0).status == 500 for one in asked]
    # Four standard deviations around the rate.
    assert abs(sum(failed) / len(failed) - rate) < 4 * (rate * (1 - rate) / len(failed)) ** 0.5
    assert failed == [fails(one, settings) for one in asked]
    assert failed != [fails(one, msgspec.structs.replace(settings, seed=1)) for one in asked]
    # An error takes as long as the first token would have.
    assert {reply_to(one, settings, now_s=0).parts[0].wait_ms for one in asked if fails(one, settings)} == {40}


def test_without_error_rates_nothing_fails_and_at_one_everything_does() -> None:
    asked = request(model="ft:m")
    assert reply_to(asked, SETTINGS, now_s=0).status == 200
    assert reply_to(asked, SimulatorSettings(baseline_error_rate=1), now_s=0).status == 200
    assert reply_to(asked, SimulatorSettings(finetuned_error_rate=1), now_s=0).status == 500
    # A fault that was asked for by name is the one that happens.
    assert reply_to(request(model="fault:401"), SimulatorSettings(baseline_error_rate=1), now_s=0).status == 401
