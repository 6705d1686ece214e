"""A string that does not show itself: keys, tokens, webhook addresses.

Its one invariant: no `repr`, `str`, format or comparison error can print the value; only `reveal()` gives it.
"""


class Secret:
    """Holds a secret; prints as `***`."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The value itself. Call it where it goes on the wire, nowhere else."""
        return self._value

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        return "***" if self._value else "(empty)"

    __str__ = __repr__
