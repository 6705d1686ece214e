"""Who is measured: each subject knows how it is started, where it listens, and why it may be absent.

Nothing here measures. LiteLLM's proxy is left out: docs/benchmarks.md says why.
"""

import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from bench import gateway_files, wire
from bench.processes import ROOT, Mock, Process, free_port, python, status_of, wait_until

READY_S = 20.0


@dataclass(frozen=True)
class Launch:
    """How to start a subject once its directory, its port and the mock's are known."""

    command: list[str]
    ready_url: str = ""


@dataclass(frozen=True)
class Subject:
    name: str
    what: str
    # None: the mock itself answers, nothing is started.
    launch: Callable[[Path, int, int], Launch] | None
    # Why it cannot run on this machine; empty if it can.
    absent: Callable[[], str] = lambda: ""


@dataclass(frozen=True)
class Running:
    """A subject that has answered once. `start_s` runs from spawn to the end of that first 200."""

    port: int
    pid: int
    start_s: float | None


def _naive(directory: Path, port: int, mock_port: int) -> Launch:
    return Launch(python("bench.naive", "--port", str(port), "--upstream", f"http://{wire.HOST}:{mock_port}"))


# Buffering is off because an answer of a model must not wait for its end. The two keepalive_requests lift
# nginx's default of 1,000 calls per connection, which no other subject has.
NGINX = """\
worker_processes 1;
daemon off;
pid {dir}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  client_body_temp_path {dir}/body;
  proxy_temp_path {dir}/proxy;
  fastcgi_temp_path {dir}/fastcgi;
  uwsgi_temp_path {dir}/uwsgi;
  scgi_temp_path {dir}/scgi;
  keepalive_requests 100000000;
  tcp_nodelay on;
  upstream mock {{ server {host}:{mock_port}; keepalive 256; keepalive_requests 100000000; }}
  server {{
    listen {host}:{port};
    location / {{
      proxy_pass http://mock;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""


def nginx_binary() -> str | None:
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


def _nginx(directory: Path, port: int, mock_port: int) -> Launch:
    config = directory / "nginx.conf"
    config.write_text(NGINX.format(dir=directory, host=wire.HOST, port=port, mock_port=mock_port))
    return Launch([nginx_binary() or "nginx", "-p", str(directory), "-c", str(config), "-e", "stderr"])


def _gateway_command() -> list[str]:
    """The installed console script; from a bare checkout, the package itself; else nothing."""
    for script in (Path(sys.executable).parent / "gateway", ROOT / ".venv" / "bin" / "gateway"):
        if script.exists():
            return [str(script)]
    return python("gateway") if importlib.util.find_spec("gateway.__main__") else []


def _gateway(directory: Path, port: int, mock_port: int) -> Launch:
    admin_port = free_port()
    arguments = gateway_files.write(directory, mock_port=mock_port, data_port=port, admin_port=admin_port)
    return Launch(_gateway_command() + arguments, f"http://{wire.HOST}:{admin_port}/readyz")


SUBJECTS = (
    Subject("direct", "the mock upstream without anything before it", None),
    Subject("naive", "aiohttp + uvloop reverse proxy, no gateway work", _naive),
    Subject(
        "nginx",
        "proxy_pass with upstream keep-alive, no gateway work",
        _nginx,
        lambda: "" if nginx_binary() else "not installed (Debian: nginx-light)",
    ),
    Subject(
        "gateway",
        "this project, everything on",
        _gateway,
        lambda: "" if _gateway_command() else "not installed",
    ),
)


@contextmanager
def running(subject: Subject, mock: Mock, directory: Path, core: int | None) -> Iterator[Running]:
    """Starts the subject, waits for its first answer, and ends it with all its children."""
    if subject.launch is None:
        yield Running(mock.port, mock.pid, None)
        return
    port = free_port()
    launch = subject.launch(directory, port, mock.port)
    question = wire.question(0, model=wire.FAST_AGENT, stream=False)
    chat = f"http://{wire.HOST}:{port}{wire.CHAT_PATH}"
    process = Process(launch.command, core=core, log=directory / "log")
    try:
        if launch.ready_url:
            wait_until(lambda: status_of(launch.ready_url) == 200, process, READY_S)
        wait_until(lambda: status_of(chat, question) == 200, process, READY_S)
        yield Running(port, process.pid, perf_counter() - process.started)
    finally:
        process.stop()
