"""promtool, the tool that Prometheus itself comes with, takes the shipped files as they are.

The proofs of prometheus/tests take half a minute and run in `make check`, which `make test` begins with.
"""

import shutil
import subprocess

import pytest

from tests.prometheus.promql import FOLDER, ROOT

PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(not PROMTOOL, reason="promtool is not on PATH; Debian's package: prometheus")


@needs_promtool
def test_config_rules_and_alerts_are_valid() -> None:
    command = [str(PROMTOOL), "check", "config", str(FOLDER / "prometheus.yml")]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_make_check_runs_every_proof() -> None:
    recipe = (ROOT / "Makefile").read_text().partition("\ncheck:")[2].partition("\n\n")[0]
    assert "promtool test rules prometheus/tests/*.yml" in recipe
    assert "promtool check config prometheus/prometheus.yml" in recipe
