"""deploy/compose.yml, proved as far as can be without a container engine: what it mounts is there, fits, and is shut.

The images are not pulled and nothing is started in them. What can be run from Debian's packages is: promtool reads
Prometheus' files as they are mounted, and the gateway serves under the policy and the variables it would get.
"""

import re
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from gateway.app import Gateway
from gateway.config import Paths, load
from tests.deploy.compose import (
    COMPOSE,
    DEPLOY,
    LISTENS,
    SERVICES,
    config_of,
    environment,
    lay_out,
    mounts,
    substituted,
)
from tests.prometheus.promql import ROOT, read
from tests.running import CHAT, chat

PROMTOOL = shutil.which("promtool")
WATCHED = {"gateway", "prometheus", "alertmanager", "collector", "jaeger", "grafana"}
# The key that docs/dashboards.md tells everybody.
KEY = "gw-compose-local"


def parsed(service: str, path: str) -> Any:
    """A YAML file that is mounted into a service, by its path there."""
    (source,) = [
        mount.source / Path(path).relative_to(mount.target) if mount.source.is_dir() else mount.source
        for mount in mounts(service)
        if mount.source is not None and Path(path).is_relative_to(mount.target)
    ]
    return yaml.safe_load(source.read_text())


def peers(text: str) -> list[tuple[str, int]]:
    """Every `service:port` in a text, of the services that there are."""
    return [(name, int(port)) for name, port in re.findall(rf"\b({'|'.join(SERVICES)}):(\d+)\b", text)]


def test_it_is_the_gateway_and_all_that_watches_it() -> None:
    assert set(SERVICES) == WATCHED
    assert (DEPLOY / SERVICES["gateway"]["build"]["context"]).resolve() == ROOT


@pytest.mark.parametrize("name", SERVICES)
def test_every_port_is_published_on_loopback_only(name: str) -> None:
    for port in SERVICES[name]["ports"]:
        host, _, inside = port.split(":")
        assert host == "127.0.0.1"
        assert int(inside) in LISTENS[name]


def test_no_two_services_want_one_port_of_the_machine() -> None:
    published = [port.split(":")[1] for service in SERVICES.values() for port in service["ports"]]
    assert len(published) == len(set(published))


@pytest.mark.parametrize("name", sorted(WATCHED - {"gateway"}))
def test_images_are_pinned_to_a_version(name: str) -> None:
    assert re.fullmatch(r"[a-z/-]+:v?\d+\.\d+\.\d+", SERVICES[name]["image"])


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_shut_in(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert int(service["user"].partition(":")[0]) > 0
    assert re.fullmatch(r"\d+[mg]", service["mem_limit"])
    assert "privileged" not in service
    assert "network_mode" not in service
    # Ours is read; only volumes are written.
    assert all(mount.is_read_only for mount in mounts(name) if mount.source is not None)


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_that_can_be_asked_is(name: str) -> None:
    if name == "gateway":
        assert "HEALTHCHECK" in (ROOT / "Dockerfile").read_text()
    elif name == "collector":
        # No shell in its image. Prometheus scrapes it, so `up` tells.
        assert "collector" in {job["job_name"] for job in _prometheus()["scrape_configs"]}
    else:
        host, port = re.search(r"http://([\d.]+):(\d+)/", SERVICES[name]["healthcheck"]["test"][-1]).groups()  # type: ignore[union-attr]
        assert host == "127.0.0.1"
        assert int(port) in LISTENS[name]


def test_every_file_that_is_mounted_exists_and_every_volume_is_declared() -> None:
    found = [mount for name in SERVICES for mount in mounts(name)]
    assert [mount.source for mount in found if mount.source is not None and not mount.source.exists()] == []
    assert {mount.name for mount in found if mount.name} == set(COMPOSE["volumes"])
    secret = substituted(COMPOSE["secrets"]["slack_webhook"]["file"])
    assert (DEPLOY / secret).is_file()
    assert substituted(COMPOSE["secrets"]["slack_webhook"]["file"], {"SLACK_WEBHOOK_FILE": "/own"}) == "/own"


def test_services_ask_each_other_where_they_listen() -> None:
    texts = [path.read_text() for path in DEPLOY.rglob("*.yml") if path.name != "compose.yml"]
    texts += [value for name in SERVICES for value in environment(name).values()]
    found = [peer for text in texts for peer in peers(text)]
    assert {name for name, _ in found} == {"gateway", "prometheus", "alertmanager", "collector", "jaeger"}
    assert [(name, port) for name, port in found if port not in LISTENS[name]] == []


def test_memory_limits_leave_the_collector_room_to_refuse() -> None:
    limits = parsed("collector", "/etc/otelcol/collector.yml")["processors"]["memory_limiter"]
    assert limits["limit_mib"] < int(SERVICES["collector"]["mem_limit"].removesuffix("m"))


# --- Prometheus ------------------------------------------------------------------------------------------------------


def _prometheus() -> Any:
    return parsed("prometheus", "/etc/prometheus/prometheus.yml")


@pytest.mark.skipif(not PROMTOOL, reason="promtool is not on PATH; Debian's package: prometheus")
def test_promtool_takes_the_files_as_they_are_mounted(tmp_path: Path) -> None:
    lay_out("prometheus", tmp_path)
    path = config_of("prometheus", tmp_path)
    found = subprocess.run([str(PROMTOOL), "check", "config", str(path)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "2 rule files found" in found.stdout


def test_it_watches_as_the_prometheus_beside_a_gateway_does() -> None:
    ours, shipped = _prometheus(), read("prometheus.yml")
    assert ours["global"] == shipped["global"]
    assert ours["rule_files"] == shipped["rule_files"]
    jobs = {job["job_name"]: job for job in ours["scrape_configs"]}
    (own,) = shipped["scrape_configs"]
    assert jobs[own["job_name"]]["static_configs"] == [{"targets": ["gateway:9090"]}]
    # Grafana's shortest windows follow from how often is scraped.
    (data,) = [one for one in _datasources() if one["uid"] == "prometheus"]
    assert data["jsonData"]["timeInterval"] == ours["global"]["scrape_interval"]


def test_what_comes_by_way_of_the_collector_is_counted_once() -> None:
    (job,) = [job for job in _prometheus()["scrape_configs"] if job["job_name"] == "collector"]
    (keep,) = job["metric_relabel_configs"]
    assert (keep["action"], keep["source_labels"]) == ("keep", ["__name__"])
    assert re.fullmatch(keep["regex"], "gen_ai_client_operation_duration_seconds_bucket")
    assert not re.fullmatch(keep["regex"], "model_requests_total")


# --- The collector and Grafana ---------------------------------------------------------------------------------------


def test_the_collectors_pipelines_are_made_of_what_it_declares() -> None:
    config = parsed("collector", "/etc/otelcol/collector.yml")
    pipelines = config["service"]["pipelines"]
    assert set(pipelines) == {"traces", "metrics"}
    for kind in ("receivers", "processors", "exporters"):
        used = {name for pipeline in pipelines.values() for name in pipeline[kind]}
        assert used == set(config[kind])
    # What the gateway speaks goes in, what Prometheus asks for comes out.
    protocols = config["receivers"]["otlp"]["protocols"]
    assert environment("gateway")["OTEL_EXPORTER_OTLP_ENDPOINT"].endswith(
        protocols["http"]["endpoint"].partition(":")[2]
    )
    assert {one["endpoint"] for one in protocols.values()} == {"0.0.0.0:4317", "0.0.0.0:4318"}
    assert config["exporters"]["prometheus"]["endpoint"].endswith(":8889")


def _datasources() -> Any:
    return parsed("grafana", "/etc/grafana/provisioning/datasources/datasources.yml")["datasources"]


def test_grafana_finds_its_dashboards_and_shows_them_to_viewers_only() -> None:
    (provider,) = parsed("grafana", "/etc/grafana/provisioning/dashboards/dashboards.yml")["providers"]
    folders = {mount.target: mount.source for mount in mounts("grafana")}
    folder = folders[provider["options"]["path"]]
    assert folder is not None
    variables = environment("grafana")
    home = Path(variables["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (folder / home.relative_to(provider["options"]["path"])).is_file()
    assert variables["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert variables["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"


def test_exemplars_lead_to_the_published_traces() -> None:
    (prometheus,) = [one for one in _datasources() if one["uid"] == "prometheus"]
    (exemplar,) = prometheus["jsonData"]["exemplarTraceIdDestinations"]
    # As Grafana reads its own files, two dollars are one.
    assert exemplar["url"] == "http://127.0.0.1:16686/trace/$${__value.raw}"
    assert exemplar["name"] == "trace_id"
    assert "127.0.0.1:16686:16686" in SERVICES["jaeger"]["ports"]
    assert "--enable-feature=exemplar-storage" in SERVICES["prometheus"]["command"]


# --- The gateway -----------------------------------------------------------------------------------------------------


def _files(root: Path) -> Paths:
    """The image's files with the mounted ones over them."""
    app = root / "app"
    shutil.copytree(ROOT / "policies", app / "policies")
    shutil.copyfile(ROOT / "config.toml", app / "config.toml")
    lay_out("gateway", root)
    return Paths(app / "config.toml", app / "policies")


async def test_the_gateway_serves_those_who_show_the_key_and_nobody_else(tmp_path: Path) -> None:
    variables = environment("gateway") | {
        "GATEWAY_STATE": str(tmp_path / "state"),
        # The system's choice of ports, and no collector here.
        "GATEWAY_DATA": "0.0.0.0:0",
        "GATEWAY_ADMIN": "0.0.0.0:0",
        "OTEL_SDK_DISABLED": "true",
    }
    paths = _files(tmp_path)
    found = load(paths, variables["GATEWAY_ENV"], litellm_map={}, environ=variables)
    gateway = Gateway(found, lambda _: found)
    await gateway.start()
    try:
        async with aiohttp.ClientSession() as session:
            data, admin = (one.url.replace("0.0.0.0", "127.0.0.1") for one in (gateway.data, gateway.admin))
            for key, status in (("", 401), ("wrong", 401), (KEY, 200)):
                headers = {"Authorization": f"Bearer {key}"} if key else {}
                async with session.post(f"{data}{CHAT}", json=chat(max_tokens=8), headers=headers) as response:
                    assert response.status == status
            # A drill: a model that fails on purpose, named outright, has a price under the caps.
            drill = chat(model="simulator/fault:503", max_tokens=8)
            async with session.post(f"{data}{CHAT}", json=drill, headers=headers) as response:
                assert response.status == 503
            for path, status in (("/metrics", 200), ("/livez", 200), ("/admin/config", 401)):
                async with session.get(f"{admin}{path}") as response:
                    assert response.status == status, path
    finally:
        await gateway.stop()


def test_the_key_everybody_knows_opens_the_simulator_only() -> None:
    text = (DEPLOY / "gateway" / "compose.toml").read_text()
    assert sha256(KEY.encode()).hexdigest() in text
    assert re.search(r'^upstream +\= "simulator"$', text, flags=re.MULTILINE)
    assert KEY in (ROOT / "docs" / "dashboards.md").read_text()
    # In every other environment there is no such key, and without any the gateway does not start off loopback.
    assert not [path for path in (ROOT / "policies").glob("*.toml") if "[[keys]]" in path.read_text()]
