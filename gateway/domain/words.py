"""Words that many sentences for people share."""


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 call, 1,200 calls. For nouns whose plural is an s."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
