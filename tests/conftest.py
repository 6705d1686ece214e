"""What holds for every test: no ambient environment, no network but loopback, repeatable examples.

Fixtures of one room live beside that room's tests, not here.
"""

import errno
import gc
import ipaddress
import os
import socket
import sys
from pathlib import Path
from typing import Any

from hypothesis import settings

# Removed before any test imports the gateway: a developer's own keys and proxies must not change what a test
# sees, and no test may spend them.
_AMBIENT = (
    "GATEWAY_",
    "GENESIS_",
    "MISTRAL_",
    "OPENAI_",
    "ANTHROPIC_",
    "LANGCHAIN_",
    "LANGSMITH_",
    "OTEL_",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
)
for _name in [name for name in os.environ if name.upper().startswith(_AMBIENT)]:
    del os.environ[_name]

# No test speaks TLS, yet each client and each process reads the certificates that the machine trusts: 70 ms a time.
os.environ["SSL_CERT_FILE"] = str(Path(__file__).parent / "data" / "certificate.pem")


def _address(host: object) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    text = host.decode("ascii", "replace") if isinstance(host, bytes) else str(host)
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _stay_on_loopback(event: str, args: tuple[Any, ...]) -> None:
    """Makes every machine look like one without a network, lest a test pass only where there is one.

    It sees what Python's own sockets do; uvloop connects and looks up by itself.
    """
    if event == "socket.connect" and isinstance(args[1], tuple):
        host = args[1][0]
        address = _address(host)
        if host != "localhost" and not (address and address.is_loopback):
            raise OSError(errno.ENETUNREACH, f"tests stay on loopback, not {host!r}")
    if event == "socket.getaddrinfo":
        host = args[0]
        if host not in (None, "", b"", "localhost", b"localhost") and _address(host) is None:
            raise socket.gaierror(socket.EAI_NONAME, f"tests look up no names, such as {host!r}")


sys.addaudithook(_stay_on_loopback)

# Deadlines are wall-clock assertions; `search` is for looking for new counterexamples by hand
# (`pytest --hypothesis-profile=search`).
# The same examples each time, so more of them find nothing new and cost a minute.
settings.register_profile("house", deadline=None, derandomize=True, database=None, max_examples=50)
settings.register_profile("search", deadline=None, max_examples=2_000)
settings.load_profile("house")


def pytest_collection_finish() -> None:
    """Thousands of tests are collected and stay: no garbage collection need look at them again."""
    gc.collect()
    gc.freeze()
