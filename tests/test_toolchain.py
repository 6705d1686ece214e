"""The locks, the Makefile and the CI entry agree, and nothing in them is bound to one machine."""

import os
import re
import socket
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gateway.store.price_map import load_price_map

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = ("run", "dev", "image", "prices")
_PIN = re.compile(r"([a-z0-9][a-z0-9.-]*)==(\S+)(?: ; [^\\]+)? \\")
_HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}(?: \\)?")


def read_lock(name: str) -> dict[str, str]:
    """Versions by name. Fails on every line that is neither a pin nor one of its hashes."""
    pins: dict[str, str] = {}
    hashes: dict[str, int] = {}
    last = ""
    for number, line in enumerate((ROOT / f"deploy/lock/{name}.txt").read_text().splitlines(), 1):
        if pin := _PIN.fullmatch(line):
            last = pin[1]
            assert last not in pins, f"{name}.txt:{number}: {last} is pinned twice"
            pins[last], hashes[last] = pin[2], 0
        else:
            assert _HASH.fullmatch(line), f"{name}.txt:{number}: neither a pin nor a hash: {line}"
            hashes[last] += 1
    assert not [package for package, count in hashes.items() if count == 0]
    return pins


def required(*tables: str) -> list[Requirement]:
    """Requirements of the package ("base"), its extras, and its dependency groups with what they include."""
    found: list[str] = []
    for table in tables:
        if table == "base":
            found += PROJECT["project"]["dependencies"]
        elif table in PROJECT["project"]["optional-dependencies"]:
            found += PROJECT["project"]["optional-dependencies"][table]
        else:
            for entry in PROJECT["dependency-groups"][table]:
                if isinstance(entry, str):
                    found.append(entry)
                else:
                    found += [str(r) for r in required(entry["include-group"])]
    return [Requirement(text) for text in found]


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_holds_pins_and_hashes_and_nothing_else(lock: str) -> None:
    # No address, no path, no option: any registry that has these very files will do.
    assert read_lock(lock)


@pytest.mark.parametrize(
    ("lock", "tables"),
    [
        ("run", ["base", "grpc", "litellm", "reports", "build"]),
        ("dev", ["base", "grpc", "litellm", "reports", "dev"]),
        ("image", ["base", "build"]),
        ("prices", ["litellm"]),
    ],
)
def test_a_lock_covers_what_pyproject_asks_for(lock: str, tables: list[str]) -> None:
    pins = read_lock(lock)
    for requirement in required(*tables):
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not in {lock}.txt; run `make lock`"
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} against {version}"


@pytest.mark.parametrize("lock", ["run", "image", "prices"])
def test_installing_one_lock_after_another_changes_no_version(lock: str) -> None:
    assert read_lock(lock).items() <= read_lock("dev").items()


def test_the_image_holds_no_litellm_and_no_test_tool() -> None:
    kept_out = {"litellm", "boto3", "openai", "pytest", "mistralai", "scipy"}
    assert not kept_out & read_lock("image").keys()
    assert read_lock("prices").keys() == {"litellm"}


def test_the_compromised_releases_of_litellm_cannot_be_installed() -> None:
    [litellm] = required("litellm")
    assert not litellm.specifier.contains("1.82.7")
    assert not litellm.specifier.contains("1.82.8")


def test_the_locked_litellm_still_has_its_price_map() -> None:
    assert load_price_map()["mistral/mistral-small-latest"].source.startswith("litellm")


def test_the_build_backend_is_locked_because_builds_are_not_isolated() -> None:
    assert set(PROJECT["build-system"]["requires"]) == set(PROJECT["dependency-groups"]["build"])


def makefile_rules() -> dict[str, str]:
    """Each named target with its prerequisites and recipe."""
    rules = re.split(r"^(?=[\w./-]+:(?!=))", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1:]
    return {rule.split(":", 1)[0]: rule.split(":", 1)[1] for rule in rules}


@pytest.mark.parametrize(
    "target", ["help", "run", "test", "check", "demo", "bench", "cover", "lock", "docker", "clean"]
)
def test_the_makefile_has_and_explains_the_target(target: str) -> None:
    assert " ## " in makefile_rules()[target].splitlines()[0]


def test_make_run_needs_no_development_packages() -> None:
    rules = makefile_rules()
    assert ".venv/.run" in rules["run"]
    assert ".venv/.dev" not in rules["run"]
    assert "deploy/lock/run.txt" in rules[".venv/.run"]


def test_everything_installed_by_make_is_hashed() -> None:
    installs = [line for rule in makefile_rules().values() for line in rule.splitlines() if " install " in line]
    assert installs
    for line in installs:
        assert "--require-hashes" in line or "--no-deps" in line, line


def test_ci_runs_what_the_readme_calls_the_tests() -> None:
    run = ROOT / ".ci/run"
    assert os.access(run, os.X_OK)
    lines = [line for line in run.read_text().splitlines() if not line.startswith("#")]
    assert lines == ["set -eu", 'cd "$(dirname "$0")/.."', "exec make test"]
    assert "make test" in (ROOT / "README.md").read_text()


def test_the_licence_is_the_one_pyproject_names() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_every_ban_gives_its_reason() -> None:
    banned = PROJECT["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    assert {"litellm", "mistralai", "requests", "httpx", "json", "toml.load"} <= banned.keys()
    assert all(len(ban["msg"]) > 10 for ban in banned.values())


def test_no_test_reaches_beyond_loopback() -> None:
    with pytest.raises(socket.gaierror, match="look up no names"):
        socket.create_connection(("api.mistral.ai", 443), timeout=1)
    with pytest.raises(OSError, match="stay on loopback"):
        socket.create_connection(("192.0.2.1", 443), timeout=1)


def test_no_test_sees_the_keys_of_whoever_runs_it() -> None:
    assert not [name for name in os.environ if name.endswith("_API_KEY") and name.startswith(("MISTRAL", "OPENAI"))]


# --- Prometheus' own programs -----------------------------------------------------------------------------------------

ITS_PROGRAMS = ("prometheus", "promtool", "amtool")


def fetch_prometheus(folder: Path, *, having: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Run the script where there is nothing but these programs, not even apt-get."""
    programs = folder / "bin"
    programs.mkdir()
    for name in having:
        (programs / name).write_text("#!/bin/sh\n")
        (programs / name).chmod(0o755)
    command = ["/bin/sh", str(ROOT / "deploy" / "prometheus.sh"), str(folder / "debian")]
    return subprocess.run(command, env={"PATH": str(programs)}, capture_output=True, text=True, check=False)


def test_what_the_machine_has_is_not_fetched(tmp_path: Path) -> None:
    done = fetch_prometheus(tmp_path, having=ITS_PROGRAMS)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "debian").exists()


@pytest.mark.parametrize("missing", ITS_PROGRAMS)
def test_what_cannot_be_fetched_is_said_and_stops_nothing(tmp_path: Path, missing: str) -> None:
    done = fetch_prometheus(tmp_path, having=tuple(name for name in ITS_PROGRAMS if name != missing))
    assert done.returncode == 0
    assert "the tests that need them are skipped" in done.stderr
