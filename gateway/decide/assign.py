"""What becomes of a user's id: a bucket, the same always, on every machine, in every language; and a hash to keep.

bucket = first 8 bytes, big-endian, of SHA-256("<salt>.<user>"), modulo 10,000; treated while bucket < share.
Its one invariant: raising the share only adds users, lowering it takes back exactly the last ones added.
Golden vectors for other languages: tests/vectors/assignment.json.
"""

from hashlib import sha256

BUCKETS = 10_000
KEPT_HEX_DIGITS = 32


def bucket_of(salt: str, user: str) -> int:
    """The user's bucket, 0 to 9,999. The salt is the agent's, so experiments are independent of each other."""
    return int.from_bytes(sha256(f"{salt}.{user}".encode()).digest()[:8], "big") % BUCKETS


def is_treated(bucket: int, share_bps: int) -> bool:
    """Whether this bucket gets the fine-tuned model at a share of `share_bps` (of 10,000)."""
    return bucket < share_bps


def hash_user(user: str, salt: str) -> str:
    """The user as it is kept: 128 bits of SHA-256 in hex. With a salt of the deployment's own it cannot be guessed."""
    return sha256(f"{salt}.{user}".encode("utf-8", "surrogateescape")).hexdigest()[:KEPT_HEX_DIGITS] if user else ""
