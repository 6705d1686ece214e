"""A real Prometheus answers every panel's query about a real gateway that had all kinds of traffic. Some ten seconds.

The board is asked as Grafana would ask it, but with seconds for minutes. How Grafana draws it is not shown here.
"""

import asyncio
import itertools
import re
from pathlib import Path

import aiohttp

from tests.collector import collector
from tests.deploy.dashboard import VARIABLES, Asked, filled_in, queries
from tests.prometheus.live import asked, hurried, needs_prometheus, prometheus
from tests.running import CHAT, RunningGateway, chat, running_gateway
from tests.scripted import Turn, scripted

# At each of them a scrape or more.
PATIENCE_TURNS = 60
WINDOW = "3s"
# One agent each: in an experiment; with a model that fails and a fallback; with one that fails alone; with streams that
# break off and are joined; with a cap that is soon used up; with a model that is to be withdrawn.
AGENTS = """
[agents.qa_agent]
finetuned = "sim/ft:qa"
baseline  = "sim/simulator-small"
[agents.support_agent]
finetuned = "sim/fault:500"
baseline  = "sim/fault:500"
fallbacks = ["sim/simulator-large"]
[agents.legal_agent]
finetuned = "sim/fault:503"
baseline  = "sim/fault:503"
[agents.content_agent]
finetuned = "sim/fault:cut"
baseline  = "sim/fault:cut"
fallbacks = ["sim/simulator-small"]
[agents.short_agent]
finetuned = "sim/simulator-small"
baseline  = "sim/simulator-small"
[agents.analyst_agent]
finetuned = "old/leaving"
baseline  = "old/leaving"
"""
POLICY = """
[models]
use_finetuned = true
[ab_testing]
enabled = true
rollout_percentage = 50
[retries]
base_s = 0.01
[breakers]
open_s = 1
[[caps]]
per = "total"
usd = "1"
[[caps]]
scope = "agent"
per = "total"
requests = 3
only = { agent = ["short_agent"] }
[[keys]]
name = "own"
sha256 = "2c70e12b7a0646f92279f427c7b38e7334d8e5389cff167a1dc30e73f826b683"
"""
KEY = {"Authorization": "Bearer key"}
# The counters of spans dropped and of shadow calls come with the first of them.
MAY_BE_EMPTY = {"What leaves the gateway: OTLP and Slack C", "Shadow calls A"}


async def says_when_it_ends(turn: Turn) -> None:
    await turn.reply({"id": "leaving", "object": "model", "deprecation": "2099-12-31T00:00:00Z"})


async def make_traffic(session: aiohttp.ClientSession, gateway: RunningGateway, turn: int) -> None:
    """A few calls of every kind, one after the other: good, failing, streamed, refused."""
    agents = ("qa_agent", "support_agent", "legal_agent", "content_agent", "short_agent", "nobody")
    for agent, stream in itertools.product(agents, (False, True)):
        user = f"u-{turn % 7}"
        body = chat(f"What of {turn}?", model=agent, stream=stream, user=user, max_tokens=40)
        async with session.post(f"{gateway.data_url}{CHAT}", json=body, headers=KEY) as response:
            await response.read()


async def answered(session: aiohttp.ClientSession, url: str, query: Asked) -> bool:
    """Whether there is a figure. Grafana fills in the instances that it knows of; here there is one."""
    return bool(await asked(session, url, hurried(filled_in(query.expression, rate_interval=WINDOW))))


async def values_of(session: aiohttp.ClientSession, url: str, query: str) -> set[str]:
    """What Grafana would offer for a variable."""
    found = re.fullmatch(r"label_values\((.*), (\w+)\)", query)
    assert found
    series = await asked(session, url, filled_in(found[1], rate_interval=WINDOW))
    return {one["metric"][found[2]] for one in series}


async def up(session: aiohttp.ClientSession, url: str) -> None:
    """Back once Prometheus answers."""
    while True:
        try:
            async with session.get(f"{url}/-/ready") as response:
                if response.status == 200:
                    return
        except aiohttp.ClientConnectionError:
            await asyncio.sleep(0.1)


@needs_prometheus
async def test_prometheus_answers_every_query_of_the_dashboard(tmp_path: Path) -> None:
    folder = tmp_path / "prometheus"
    folder.mkdir()
    async with (
        scripted(says_when_it_ends) as old,
        collector() as otlp,
        running_gateway(
            tmp_path,
            upstreams={"old": old.base_url},
            agents=AGENTS,
            policy=POLICY,
            environ={
                "OTEL_EXPORTER_OTLP_ENDPOINT": otlp.url,
                "OTEL_METRIC_EXPORT_INTERVAL": "200",
                "OTEL_TRACES_SAMPLER": "parentbased_always_on",
            },
        ) as gateway,
        prometheus(folder, gateway.admin_url.removeprefix("http://")) as url,
        aiohttp.ClientSession() as session,
    ):
        address = gateway.admin_url.removeprefix("http://")
        async with session.get(f"{gateway.admin_url}/health") as response:
            assert response.status in (200, 503)
        await up(session, url)
        empty = {f"{query.title} {query.ref}": query for query in queries()}
        for turn in range(PATIENCE_TURNS):
            await make_traffic(session, gateway, turn)
            empty = {name: query for name, query in empty.items() if not await answered(session, url, query)}
            if empty.keys() <= MAY_BE_EMPTY:
                break
            # Some calls a second are enough; the rest of the machine is Prometheus'.
            await asyncio.sleep(0.2)
        assert empty.keys() <= MAY_BE_EMPTY
        values = [await values_of(session, url, variable["query"]["query"]) for variable in VARIABLES[:4]]
    environments, instances, agents, models = values
    assert environments == {"dev"}
    assert instances == {address}
    # All that there are, also the one that nobody called.
    assert agents == {
        "qa_agent", "support_agent", "legal_agent", "content_agent", "short_agent", "analyst_agent",
    }  # fmt: skip
    assert {"sim/ft:qa", "sim/simulator-small", "sim/simulator-large", "sim/fault:503"} <= models
