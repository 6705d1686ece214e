"""The copy of the configuration is sound and reaches nobody; the process never outlives its block."""

import asyncio
from pathlib import Path

import aiohttp
import pytest

from gateway.config import Loaded, Paths, load
from gateway.decide.plan import upstreams_in_use
from gateway.lab.trial_gateway import (
    Tables,
    TrialFailed,
    TrialGateway,
    for_trial,
    read_tables,
    trial_gateway,
    write_tables,
)

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ["dev", "staging", "production"]


def shipped(env: str = "production") -> Tables:
    return read_tables(ROOT / "config.toml", ROOT / "policies", env)


def loaded(tables: Tables, folder: Path) -> Loaded:
    write_tables(tables, folder)
    return load(Paths(folder / "config.toml", folder / "policies"), tables.env, litellm_map={}, environ={})


@pytest.mark.parametrize("env", ENVIRONMENTS)
def test_every_shipped_environment_can_be_tried_without_any_key(tmp_path: Path, env: str) -> None:
    found = loaded(for_trial(shipped(env), tmp_path, share_percent=None, faults={}), tmp_path)
    assert upstreams_in_use(found.settings, found.policy) == {"simulator"}
    assert (found.settings.server.data.port, found.settings.server.admin.port) == (0, 0)
    assert found.settings.server.data.is_loopback
    assert Path(found.settings.journal.dir).is_relative_to(tmp_path)
    assert str(tmp_path) in found.settings.store.url
    assert not found.policy.alerting.enabled


def test_what_is_tried_is_the_shipped_policy(tmp_path: Path) -> None:
    found = loaded(for_trial(shipped(), tmp_path, share_percent=None, faults={}), tmp_path)
    variables = {"MISTRAL_API_KEY": "k", "OPENAI_API_KEY": "k"}
    real = load(Paths(ROOT / "config.toml", ROOT / "policies"), "production", litellm_map={}, environ=variables)
    assert found.policy.ab_testing == real.policy.ab_testing
    assert (found.policy.caps, found.policy.limits) == (real.policy.caps, real.policy.limits)
    assert found.settings.agents == real.settings.agents
    for name, agent in real.plan.agents.items():
        assert found.plan.agents[name].salt == agent.salt == shipped().salts[name]
        for here, there in zip(found.plan.agents[name].finetuned, agent.finetuned, strict=True):
            assert (here.ref, here.model, here.price) == (there.ref, there.model, there.price)


def test_a_fault_changes_one_model_and_not_its_price(tmp_path: Path) -> None:
    tables = shipped()
    plan = loaded(for_trial(tables, tmp_path, share_percent=25, faults={"qa_agent": "503@0.2"}), tmp_path).plan
    faulty = plan.agents["qa_agent"].finetuned[0]
    assert faulty.model.startswith("ft:open-mistral-7b:")
    assert faulty.model.endswith(":fault:503@0.2")
    assert faulty.price == plan.agents["legal_agent"].finetuned[0].price
    assert "fault" not in "".join(target.ref for target in plan.agents["legal_agent"].finetuned)
    assert {agent.share_bps for agent in plan.agents.values()} == {2500}
    assert tables == shipped(), "the tables read are not changed by a copy"


@pytest.mark.parametrize(
    "models, expected",
    [({}, True), ({"use_finetuned": False}, False), ({"fallback_enabled": False}, False)],
)
def test_whether_another_model_would_step_in(models: dict[str, bool], expected: bool) -> None:
    assert shipped()._replace(policy={"models": models}).has_finetuned_with_fallback is expected


async def is_alive(gateway: TrialGateway) -> bool:
    try:
        async with aiohttp.ClientSession() as session, session.get(f"{gateway.admin_url}/livez") as reply:
            return reply.status == 200
    except aiohttp.ClientConnectionError:
        return False


async def test_when_the_block_is_cancelled_process_and_directory_are_gone() -> None:
    served: asyncio.Future[TrialGateway] = asyncio.get_running_loop().create_future()

    async def serve_for_ever() -> None:
        async with trial_gateway(shipped()) as gateway:
            served.set_result(gateway)
            await asyncio.Event().wait()

    task = asyncio.create_task(serve_for_ever())
    gateway = await served
    folder = gateway.journal.parent
    assert folder.is_dir()
    assert await is_alive(gateway)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not folder.exists()
    assert not await is_alive(gateway)


async def test_a_gateway_that_cannot_start_says_why() -> None:
    tables = shipped()
    broken = tables._replace(policy={**tables.policy, "limits": {"n": 0}})
    with pytest.raises(TrialFailed, match=r"limits\.n"):
        async with trial_gateway(broken):
            raise AssertionError("it must not start")
