"""However a stream is cut, the same events come out; and the tap misses nothing that matters."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain import sse
from gateway.domain.errors import FaultKind, UpstreamFault
from gateway.domain.money import Usage
from gateway.domain.sse import DONE, DONE_FRAME, Splitter, Tap, frame

SMILE = chr(0x1F642)
HAND = chr(0x2764) + chr(0xFE0F)


def split(*chunks: bytes) -> list[bytes]:
    splitter = Splitter()
    events = [event for chunk in chunks for event in splitter.feed(chunk)]
    return events + splitter.end()


# --- Splitting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eol", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("stream", "events"),
    [
        ("data: a|", ["a"]),
        ("data: a||data: b||", ["a", "b"]),
        ("data:a||data:  b||", ["a", " b"]),
        ("data: a|data: b||", ["a\nb"]),
        ("data: {|data:|data: }||", ["{\n\n}"]),
        (": a comment|data: a||: keep-alive||data: b||", ["a", "b"]),
        ("event: chunk|id: 7|retry: 10|data: a||", ["a"]),
        ("event: ping||data: a||", ["a"]),
        ("event: ping|data:||data: a||", ["a"]),
        ("data:||data: a||", ["a"]),
        ("|||data: a||||data: b|", ["a", "b"]),
        ("data: a||data: b", ["a", "b"]),
        ("data: a: b||", ["a: b"]),
        ("dat: a|data : b|DATA: c|datax: d||", []),
        (f"data: {SMILE}é||data: [DONE]||", [f"{SMILE}é", "[DONE]"]),
        ("", []),
        (": nothing but a comment", []),
    ],
)
def test_events_come_out_whole_whatever_the_cut_and_the_end_of_line(stream: str, events: list[str], eol: str) -> None:
    data = stream.replace("|", eol).encode()
    wanted = [event.encode() for event in events]
    assert split(data) == wanted
    assert split(b"\xef\xbb\xbf" + data) == wanted
    for at in range(len(data) + 1):
        assert split(data[:at], data[at:]) == wanted
        assert split(data[:at], b"", data[at:]) == wanted
    assert split(*(data[at : at + 1] for at in range(len(data)))) == wanted
    marked = b"\xef\xbb\xbf" + data
    assert split(*(marked[at : at + 1] for at in range(len(marked)))) == wanted


def test_a_byte_order_mark_counts_only_at_the_start() -> None:
    assert split(b"data: a\n\n\xef\xbb\xbfdata: b\n\n") == [b"a"]
    assert split(b"\xef\xbb", b"\xbf", b"data: a\n\n") == [b"a"]
    assert split(b"\xef") == split(b"\xef\xbb\xbf") == []


def test_an_event_comes_out_with_the_byte_that_ends_it() -> None:
    splitter = Splitter()
    assert splitter.feed(b"data: a\r") == []
    assert splitter.feed(b"\n") == []
    assert splitter.feed(b"\r") == [b"a"]
    assert splitter.feed(b"\ndata: b\n\n") == [b"b"]


LINES = st.sampled_from(
    [b"data: x", b"data: " + f"{SMILE}{HAND}".encode(), b"data:", b"data:  y", b"event: e", b"id: 1", b": c", b"", b"",
     b"data: [DONE]", b"\xef\xbb\xbf", b"junk", b"data"]
)  # fmt: skip
STREAMS = st.lists(st.tuples(LINES, st.sampled_from([b"\n", b"\r\n", b"\r"])), max_size=12).map(
    lambda lines: b"".join(line + eol for line, eol in lines)
)


@given(STREAMS | st.binary(max_size=40), st.lists(st.integers(0, 200), max_size=8))
def test_what_comes_out_does_not_depend_on_how_it_was_cut(data: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    chunks = [data[start:stop] for start, stop in pairwise(edges)]
    assert split(*chunks) == split(data)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=5))
def test_what_is_framed_splits_into_the_same_json(texts: list[str]) -> None:
    chunks = [json.dumps({"text": text}, ensure_ascii=False, indent=1).encode() for text in texts]
    events = split(b"".join(frame(chunk) for chunk in chunks))
    assert [json.loads(event) for event in events] == [{"text": text} for text in texts]


def test_a_frame_is_one_line_of_data_and_a_blank_one() -> None:
    assert frame(b'{"a":\n1}') == b'data: {"a": 1}\n\n'
    assert frame(DONE) == DONE_FRAME == b"data: [DONE]\n\n"


def test_an_event_without_an_end_is_a_fault_and_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 1_000)
    for line in (b"x" * 100, b"data: " + b"x" * 93 + b"\n", b"data:\n" * 16):
        with pytest.raises(UpstreamFault) as caught:
            split(*[line] * 200)
        assert caught.value.kind is FaultKind.INVALID
    long = Splitter()
    for _ in range(200):
        assert long.feed(b"data: " + b"x" * 90 + b"\n\n") == [b"x" * 90]


# --- The tap ---------------------------------------------------------------------------------------------------------


def chunk(delta: dict[str, Any] | None = None, finish: str | None = None, index: int = 0, **fields: Any) -> bytes:
    choice = {"index": index, "delta": delta or {}, "finish_reason": finish}
    whole = {"id": "c", "object": "chat.completion.chunk", "model": "gpt-x", "choices": [choice], **fields}
    return json.dumps(whole, separators=(",", ":")).encode()


def tapped(*events: bytes) -> Tap:
    tap = Tap()
    for event in events:
        tap.look(event)
    return tap


USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def test_a_whole_stream() -> None:
    tap = tapped(
        chunk({"role": "assistant"}),
        chunk({"content": "Hello"}),
        chunk({}, "stop"),
        chunk(choices=[], usage=USAGE),
    )
    assert (tap.model, tap.finish_reason, tap.finished) == ("gpt-x", "stop", 1)
    assert tap.usage == Usage(prompt_tokens=3, completion_tokens=2)
    assert tap.error is None


def test_usage_beside_the_finish_reason() -> None:
    tap = tapped(chunk({"content": "a"}), chunk({"content": ""}, "stop", usage=USAGE))
    assert (tap.finish_reason, tap.usage) == ("stop", Usage(prompt_tokens=3, completion_tokens=2))


def test_malformed_json_in_the_middle_is_noticed_however_plain_it_looks() -> None:
    tap = tapped(chunk({"role": "assistant"}))
    good = chunk({"content": "plain"})
    for bad in (good[:-1], good.replace(b'"plain"', b'"plain'), good.replace(b'"plain"', b"plain"), good + b"}"):
        assert tap.look(bad) is None
    assert tap.malformed == 4
    answer = tap.look(good)
    assert answer is not None
    assert answer.choices
    assert tap.malformed == 4


TRICKS = [
    '"usage"', '"usage":null', '"finish_reason":null', '"finish_reason":"stop"', '"error"', '"error":{"message":"x"}',
    '{"choices":[{"finish_reason":null}],"usage":null}', "}", '","usage":null,"x":"', '\\"usage\\":null', SMILE,
]  # fmt: skip


@pytest.mark.parametrize("text", TRICKS)
@pytest.mark.parametrize("delta", ["content", "tool_calls"])
def test_a_text_that_speaks_of_fields_hides_none_and_makes_none(text: str, delta: str) -> None:
    saying: dict[str, Any] = {"content": text}
    if delta == "tool_calls":
        saying = {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}
    tap = tapped(chunk({"role": "assistant"}), chunk(saying))
    assert (tap.finish_reason, tap.usage, tap.error, tap.finished) == (None, None, None, 0)
    tap = tapped(chunk({"role": "assistant"}), chunk(saying, "length", usage=USAGE))
    assert (tap.finish_reason, tap.usage) == ("length", Usage(prompt_tokens=3, completion_tokens=2))


@given(st.lists(st.sampled_from(TRICKS) | st.text(max_size=8), max_size=4).map("".join), st.booleans(), st.booleans())
def test_the_scan_agrees_with_the_parse(text: str, finishes: bool, has_usage: bool) -> None:
    event = chunk({"content": text}, "stop" if finishes else None, usage=USAGE if has_usage else None)
    scanned, parsed = tapped(chunk({"role": "assistant"}), event), tapped(event)
    for name in ("model", "finish_reason", "usage", "error", "finished"):
        assert getattr(scanned, name) == getattr(parsed, name)


def test_a_null_usage_further_in_does_not_hide_the_real_one() -> None:
    tap = tapped(chunk({"role": "assistant"}), chunk({"content": "x"}, x_extra={"usage": None}, usage=USAGE))
    assert tap.usage is not None


def test_several_choices_are_finished_when_each_of_them_is() -> None:
    tap = tapped(chunk({"content": "a"}), chunk({"content": "b"}, index=1), chunk({}, "stop"))
    assert tap.finished == 1
    tap.look(chunk({}, "stop"))
    assert tap.finished == 1, "said twice of the same choice"
    tap.look(chunk({}, "length", index=1))
    assert (tap.finished, tap.finish_reason) == (2, "length")


def test_two_choices_in_one_chunk() -> None:
    both = [{"index": 0, "delta": {}, "finish_reason": None}, {"index": 1, "delta": {}, "finish_reason": "stop"}]
    tap = tapped(chunk(), chunk(choices=both))
    assert (tap.finished, tap.finish_reason) == (1, "stop")


def test_the_last_usage_holds_and_a_null_takes_nothing_back() -> None:
    tap = tapped(chunk(usage={**USAGE, "completion_tokens": 1}), chunk({}, "stop", usage=USAGE), chunk(usage=None))
    assert tap.usage == Usage(prompt_tokens=3, completion_tokens=2)


@pytest.mark.parametrize("error", [{"message": "overloaded"}, "overloaded"])
def test_an_error_in_the_stream_is_kept(error: Any) -> None:
    event = json.dumps({"error": error}).encode()
    for events in ([event], [chunk({"role": "assistant"}), event]):
        assert tapped(*events).error == event
    assert tapped(chunk(error=None)).error is None


def test_a_stream_that_names_no_model_is_read_all_the_same() -> None:
    tap = tapped(chunk(model=None), chunk({"content": "x"}), chunk({}, "stop"))
    assert (tap.model, tap.finish_reason) == ("gpt-x", "stop")
    assert tapped(chunk(model=None)).model == ""


@pytest.mark.parametrize(
    "event",
    [b"", b"not json", b"{", b"[]", b"null", b'"x"', b'{"choices":7}', b'{"model":"\xff"}',
     b'{"choices":[{"delta":{"content":"\xff"}}]}', b'{"choices":[{"delta":{"content":"\\ud83d"}}]}'],
)  # fmt: skip
def test_an_event_that_is_no_chunk_is_counted_and_tells_nothing(event: bytes) -> None:
    said = (chunk({"role": "assistant"}), chunk({"content": "a"}, "stop", usage=USAGE))
    for before in ((), said):
        tap, same = tapped(*before), tapped(*before)
        assert tap.look(event) is None
        assert tap.malformed == 1
        for name in ("model", "finish_reason", "usage", "error", "finished", "done"):
            assert getattr(tap, name) == getattr(same, name)


PLAIN_CHUNK = chunk({"content": "SMILE 1.5e3"}, usage=USAGE).replace(b"SMILE", f"{SMILE}é".encode())


@given(
    st.integers(0, len(PLAIN_CHUNK)),
    st.integers(0, 3),
    st.sampled_from(
        [b"", b"{", b"}", b'"', b",", b":", b"\\", b"\\u", b"\n", b"\x00", b"\x80", b"\xff", b"1e999", b"-", b"nul"]
    ),
)
def test_what_passes_for_a_chunk_is_json_to_every_other_reader_too(at: int, gone: int, put: bytes) -> None:
    event = PLAIN_CHUNK[:at] + put + PLAIN_CHUNK[at + gone :]
    if Tap().look(event) is not None:
        assert isinstance(json.loads(event.decode()), dict)


def test_what_stands_around_a_malformed_event_is_read_as_ever() -> None:
    tap = tapped(chunk({"content": "a"}), b"{", chunk({}, "stop"), b"}", chunk(choices=[], usage=USAGE))
    assert (tap.malformed, tap.finish_reason, tap.finished) == (2, "stop", 1)
    assert tap.usage == Usage(prompt_tokens=3, completion_tokens=2)


@pytest.mark.parametrize("usage", [{"prompt_tokens": "3"}, [], {"completion_tokens": 3}, {"prompt_tokens": 1.5}])
def test_usage_that_cannot_be_read_is_no_usage_and_no_fault(usage: Any) -> None:
    tap = tapped(chunk({}, "stop", usage=usage))
    assert (tap.usage, tap.finish_reason) == (None, "stop")
