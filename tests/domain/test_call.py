"""A record survives its way to the journal and back, and stays readable when fields are added later."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.call import Attempt, CallRecord
from gateway.domain.errors import FaultKind
from gateway.domain.money import Usage

COUNTS = st.integers(0, 2**31)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
MILLISECONDS = st.floats(0, 1e7)
ATTEMPTS = st.builds(
    Attempt,
    ref=TEXTS,
    started_ms=COUNTS,
    duration_ms=MILLISECONDS,
    status=st.integers(0, 599),
    fault=st.none() | st.sampled_from(FaultKind),
    is_in_doubt=st.booleans(),
    cost_nusd=st.integers(0, 2**53),
    tokens=COUNTS,
)
RECORDS = st.builds(
    CallRecord,
    id=TEXTS,
    at_ms=st.integers(0, 2**53),
    env=TEXTS,
    agent=TEXTS,
    variant=st.sampled_from([None, "finetuned", "baseline"]),
    bucket=st.none() | st.integers(0, 9_999),
    share_bps=st.none() | st.integers(0, 10_000),
    user=TEXTS,
    key=TEXTS,
    operation=TEXTS,
    switched_by=TEXTS,
    stream=st.booleans(),
    attempts=st.lists(ATTEMPTS, max_size=3),
    status=st.integers(0, 599),
    usage=st.none() | st.builds(Usage, prompt_tokens=COUNTS, completion_tokens=COUNTS),
    cost_nusd=st.integers(0, 2**53),
    cost_basis=st.sampled_from(["exact", "estimate", "bound", "none", "manual"]),
    duration_ms=MILLISECONDS,
    first_chunk_ms=st.none() | MILLISECONDS,
    client_left=st.booleans(),
)


@given(RECORDS)
def test_a_record_comes_back_as_it_was(record: CallRecord) -> None:
    assert msgspec.json.decode(msgspec.json.encode(record), type=CallRecord) == record


def test_what_is_at_its_default_takes_no_room() -> None:
    record = CallRecord(id="c1", at_ms=1, env="dev")
    assert msgspec.json.encode(record) == b'{"event":"call","id":"c1","at_ms":1,"env":"dev"}'


def test_a_bucket_of_zero_is_not_mistaken_for_none() -> None:
    record = CallRecord(id="c1", at_ms=1, env="dev", bucket=0, share_bps=0, first_chunk_ms=0.0)
    again = msgspec.json.decode(msgspec.json.encode(record), type=CallRecord)
    assert (again.bucket, again.share_bps, again.first_chunk_ms) == (0, 0, 0.0)


def test_an_older_gateway_reads_a_newer_record() -> None:
    text = b'{"event":"call","id":"c1","at_ms":1,"env":"dev","of_tomorrow":{"x":1}}'
    found = msgspec.json.decode(text, type=CallRecord)
    assert found.id == "c1"


@pytest.mark.parametrize("kind", FaultKind)
def test_every_kind_of_fault_comes_back_from_its_word(kind: FaultKind) -> None:
    attempts = b'[{"ref":"a/b","started_ms":0,"fault":"%b"}]' % kind.encode()
    line = b'{"event":"call","id":"c1","at_ms":1,"env":"dev","attempts":%b}' % attempts
    found = msgspec.json.decode(line, type=CallRecord)
    assert found.attempts[0].fault is kind
    assert msgspec.json.encode(found) == line


def test_a_kind_of_fault_is_written_as_its_word() -> None:
    attempt = Attempt(ref="a/b", started_ms=0, fault=FaultKind.FIRST_TOKEN)
    assert msgspec.json.encode(attempt) == b'{"ref":"a/b","started_ms":0,"fault":"first_token"}'


def test_records_do_not_share_their_attempts() -> None:
    first, second = CallRecord(id="a", at_ms=1, env="dev"), CallRecord(id="b", at_ms=1, env="dev")
    first.attempts.append(Attempt(ref="x", started_ms=0))
    assert second.attempts == []
