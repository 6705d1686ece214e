"""A gateway for a trial: a real `gateway serve` in a process of its own, on a copy of the configuration.

The copy differs in what a trial needs: ports the system chooses, files in a directory of its own, the simulator in
every provider's place, nobody alarmed. The invariant: when the block ends, however it ends, process and directory are
gone.
"""

import asyncio
import re
import shutil
import sys
import tomllib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import toml

START_S = 20.0
STOP_S = 10.0
SIMULATOR = "simulator"
# With -m, Python looks for the package in its working directory first: this very gateway, installed or not.
_HOME = Path(__file__).parents[2]
_ADDRESSES = re.compile(r"agents\s+(http://\S+)/v1\b.*admin\s+(http://\S+)", re.DOTALL)


class TrialFailed(Exception):
    """The gateway did not start; the message has what it said."""


class Tables(NamedTuple):
    """One environment's configuration as it stands in the files, variables not put in."""

    env: str
    config: dict[str, Any]
    policy: dict[str, Any]
    routing: Path

    @property
    def salts(self) -> dict[str, str]:
        """Each agent's salt: its name, where it has none of its own."""
        return {name: agent.get("salt") or name for name, agent in self.config["agents"].items()}

    @property
    def has_finetuned_with_fallback(self) -> bool:
        """Whether somebody may get a fine-tuned model, and another one where that fails."""
        models = self.policy.get("models", {})
        return bool(models.get("use_finetuned", True) and models.get("fallback_enabled", True))


class Served(NamedTuple):
    """One gateway process, and where it listens."""

    process: asyncio.subprocess.Process
    data_url: str
    admin_url: str


class TrialGateway(NamedTuple):
    """Where it listens and where it writes."""

    data_url: str
    admin_url: str
    journal: Path
    log: Path


def read_tables(config: Path, policies: Path, env: str) -> Tables:
    """The files of one environment, which have been checked before."""
    return Tables(
        env=env,
        config=tomllib.loads(config.read_text(encoding="utf-8")),
        policy=tomllib.loads((policies / f"{env}.toml").read_text(encoding="utf-8")),
        routing=policies / "routing.toml",
    )


def for_trial(tables: Tables, folder: Path, *, share_percent: float | None, faults: Mapping[str, str]) -> Tables:
    """The copy for a trial. `faults` gives agents whose fine-tuned model misbehaves, and the simulator's fault.

    The fault is a suffix of the model's id, so the model keeps its upstream and the price of its prefix.
    """
    config, policy = dict(tables.config), dict(tables.policy)
    config["server"] = {
        **config.get("server", {}), "data": "127.0.0.1:0", "admin": "127.0.0.1:0", "drain_s": 1,
    }  # fmt: skip
    config["journal"] = {**config.get("journal", {}), "dir": str(folder / "journal")}
    config["store"] = {"url": f"sqlite:///{folder / 'gateway.db'}"}
    config["upstreams"] = {**config["upstreams"], SIMULATOR: {"kind": "simulator"}}
    config["agents"] = {
        name: {**agent, "finetuned": f"{agent['finetuned']}:fault:{faults[name]}"} if name in faults else agent
        for name, agent in config["agents"].items()
    }
    policy["models"] = {**policy.get("models", {}), "upstream": SIMULATOR}
    policy.pop("alerting", None)
    policy.pop("keys", None)
    if share_percent is not None:
        policy["ab_testing"] = {**policy.get("ab_testing", {}), "enabled": True, "rollout_percentage": share_percent}
    return tables._replace(config=config, policy=policy)


def write_tables(tables: Tables, folder: Path) -> None:
    """config.toml and policies/ into `folder`."""
    policies = folder / "policies"
    policies.mkdir()
    (folder / "config.toml").write_text(toml.dumps(tables.config), encoding="utf-8")
    (policies / f"{tables.env}.toml").write_text(toml.dumps(tables.policy), encoding="utf-8")
    shutil.copy(tables.routing, policies / "routing.toml")


@asynccontextmanager
async def trial_gateway(
    tables: Tables, *, share_percent: float | None = None, faults: Mapping[str, str] | None = None
) -> AsyncIterator[TrialGateway]:
    """A gateway that serves until the block ends. Raises `TrialFailed`."""
    with TemporaryDirectory(prefix="gateway-trial-") as name:
        folder = Path(name)
        write_tables(for_trial(tables, folder, share_percent=share_percent, faults=faults or {}), folder)
        log = folder / "gateway.log"
        async with served(folder, tables.env, log) as gateway:
            yield TrialGateway(gateway.data_url, gateway.admin_url, folder / "journal", log)


@asynccontextmanager
async def served(folder: Path, env: str, log: Path) -> AsyncIterator[Served]:
    """A gateway on the configuration in `folder`, until the block ends; several may share one. Raises `TrialFailed`."""
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gateway", "serve", "--env", env,
            "--config", str(folder / "config.toml"), "--policies", str(folder / "policies"),
            cwd=_HOME, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=errors,
        )  # fmt: skip
    try:
        yield Served(process, *await _addresses(process, log))
    finally:
        await _end(process)


async def _addresses(process: asyncio.subprocess.Process, log: Path) -> tuple[str, str]:
    """Both listeners' addresses, from what the gateway announces."""
    assert process.stdout is not None
    announced = ""
    try:
        async with asyncio.timeout(START_S):
            while line := await process.stdout.readline():
                announced += line.decode("utf-8", "replace")
                found = _ADDRESSES.search(announced)
                if found:
                    return found[1], found[2]
    except TimeoutError:
        pass
    raise TrialFailed(f"the gateway did not start:\n{announced}{_text(log)}")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


async def _end(process: asyncio.subprocess.Process) -> None:
    """Ask it to leave; where it does not, or nobody waits for that any more, make it."""
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(STOP_S):
            await process.communicate()
    except BaseException as stopped:
        process.kill()
        await process.communicate()
        if not isinstance(stopped, TimeoutError):
            raise
