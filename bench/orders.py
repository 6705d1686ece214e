"""What the conductor asks of the load generator and what it gets back: two values, sent as JSON lines."""

import msgspec


class Order(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One run against one port. `rate_per_s` 0: the closed loop, each connection asks again once answered."""

    port: int
    path: str
    model: str
    stream: bool
    connections: int
    warm_s: float
    window_s: float
    requests: int
    rate_per_s: int = 0
    # The connections' first calls are spread over this time.
    spread_s: float = 0.0
    subject_pid: int
    mock_pid: int


class Result(msgspec.Struct, kw_only=True):
    """What one window showed. Times of calls in ms; None where no call ended inside the window."""

    completed: int
    chunks: int
    errors: int
    first_error: str
    seconds: float
    cpu_us: int
    p50_ms: float | None
    p99_ms: float | None
    first_chunk_p50_ms: float | None
    # Share of one core that generator and mock used: near 1, the figure is theirs and not the subject's.
    generator_busy: float
    # Calls of an open loop that waited because every connection was taken.
    queued: int
    # Calls asked in all, warm-up and drain included: the mock must have counted as many.
    asked: int
