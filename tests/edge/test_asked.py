"""What is asked in JSON is decoded, or refused with the field that is wrong and in no word of a library."""

import msgspec
import pytest

from gateway.domain.errors import Refused
from gateway.edge.asked import decoded


class Wanted(msgspec.Struct, forbid_unknown_fields=True):
    who: str
    share: float = 0.0


def test_what_is_in_order_is_decoded() -> None:
    assert decoded(b'{"who": "ann", "share": 1}', Wanted) == Wanted("ann", 1.0)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b'{"share": 1}', "missing_field", "who"),
        (b'{"who": "ann", "size": 1}', "invalid_value", "size"),
        (b'{"who": 7}', "invalid_type", "who"),
        (b"[]", "invalid_type", None),
        (b"", "invalid_json", None),
        (b"{", "invalid_json", None),
        (b'{"who": "\xff"}', "invalid_json", None),
        (b'{"who": "ann"} {}', "invalid_json", None),
    ],
)
def test_what_is_not_says_which_field(body: bytes, code: str, param: str | None) -> None:
    with pytest.raises(Refused) as refused:
        decoded(body, Wanted)
    assert (refused.value.code, refused.value.param) == (code, param)
    assert "msgspec" not in refused.value.message
