"""After every fault there is an answer to "and now?", and nothing is tried again once bytes have gone out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.decide.fallback import REMEDIES, Step, next_step
from gateway.domain.errors import FaultKind

GIVES_UP = {FaultKind.REJECTED}
# Nothing was sent, or the provider refused before it began: it has nothing to put on a bill.
CANNOT_BE_BILLED = {FaultKind.CONNECT, FaultKind.RATE_LIMITED, FaultKind.SERVER, FaultKind.NOT_FOUND, FaultKind.AUTH,
                    FaultKind.REJECTED}  # fmt: skip


def test_every_fault_has_a_remedy_with_a_reason() -> None:
    assert set(REMEDIES) == set(FaultKind)
    assert all(remedy.why for remedy in REMEDIES.values())


@pytest.mark.parametrize("fault", FaultKind)
def test_the_next_model_is_tried_unless_the_request_itself_is_at_fault(fault: FaultKind) -> None:
    step = next_step(fault, models_left=1, left_s=0.001, has_sent_bytes=False)
    assert step is (Step.GIVE_UP if fault in GIVES_UP else Step.NEXT_MODEL)


@pytest.mark.parametrize("fault", FaultKind)
def test_only_what_cannot_be_billed_is_free(fault: FaultKind) -> None:
    assert REMEDIES[fault].may_be_billed is (fault not in CANNOT_BE_BILLED)


@given(st.sampled_from(FaultKind), st.integers(0, 5), st.floats(-10, 10))
def test_nothing_is_tried_again_once_bytes_have_gone_out(fault: FaultKind, models_left: int, left_s: float) -> None:
    assert next_step(fault, models_left=models_left, left_s=left_s, has_sent_bytes=True) is Step.GIVE_UP


@pytest.mark.parametrize(("models_left", "left_s"), [(0, 10.0), (1, 0.0), (1, -1.0), (0, 0.0)])
def test_without_a_model_or_time_left_it_gives_up(models_left: int, left_s: float) -> None:
    step = next_step(FaultKind.SERVER, models_left=models_left, left_s=left_s, has_sent_bytes=False)
    assert step is Step.GIVE_UP
