"""The composition root: the only place that builds things, starts them in order, and takes them down again."""

import asyncio
import gc
import logging
import signal
import time
from collections.abc import Callable, Mapping
from functools import partial
from random import Random
from typing import TYPE_CHECKING

from gateway.config import ConfigError, Loaded, effective
from gateway.decide.plan import Plan
from gateway.decide.standing import Standing
from gateway.domain.rollout import RolloutState
from gateway.domain.settings import Settings
from gateway.domain.settings import Upstream as UpstreamSettings
from gateway.edge.admin import admin_app
from gateway.edge.alerts import Alerts
from gateway.edge.daily import Daily
from gateway.edge.data_app import data_app
from gateway.edge.listener import Listener, require_c_parser
from gateway.edge.money_metrics import money_figures
from gateway.edge.pilot import Pilot
from gateway.edge.rollouts import Rollouts
from gateway.edge.runtime import Runtime
from gateway.edge.upstream import HttpUpstream
from gateway.edge.watch import reload_on, watch_files
from gateway.store.store import Crossing, StoreError
from gateway.telemetry.observe import Observer
from gateway.telemetry.tracing import Tracing
from gateway.treasury import CannotKeepBooks, Treasury, ledger_path

if TYPE_CHECKING:
    from gateway.simulator.server import Simulator
    from gateway.telemetry.otlp import OtlpExport

log = logging.getLogger("gateway")


class Gateway:
    """One gateway process: built from a `Loaded`, started, reloaded, stopped."""

    def __init__(self, loaded: Loaded, load_again: Callable[[Settings], Loaded]) -> None:
        self._loaded = loaded
        self._load_again = load_again
        self._simulators: list[Simulator] = []
        self._retired: list[HttpUpstream] = []
        self._pools: dict[str, HttpUpstream] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._reloading = asyncio.Lock()
        self._treasury: Treasury | None = None
        self._rollouts: Rollouts | None = None
        self._pilot: Pilot | None = None
        paths = loaded.paths
        named = ["--config", str(paths.config), "--policies", str(paths.policies), "--env", loaded.env]
        self._daily = Daily(loaded.policy.reports, named)
        self.otlp: OtlpExport | None = None
        self._alerts = Alerts(loaded.policy.alerting, env=loaded.env)
        self.runtime: Runtime
        self.data: Listener
        self.admin: Listener

    async def start(self) -> None:
        """Serve. Raises OSError where an address or the journal cannot be had; nothing is left open then."""
        require_c_parser()
        try:
            await self._start()
        except BaseException:
            await self._close_pools()
            if self._treasury is not None:
                await self._treasury.close()
            raise

    async def _start(self) -> None:
        loaded = self._loaded
        settings = loaded.settings
        await self._make_pools(settings.upstreams)
        standing = Standing(loaded.policy.breakers, loaded.policy.retries)
        observer = Observer(loaded.plan, standing, tuple(settings.telemetry.latency_buckets_ms))

        def tell(crossing: Crossing) -> None:
            observer.crossed(crossing.share)
            self._alerts.tell(crossing)

        def steer(states: Mapping[tuple[str, str], RolloutState]) -> None:
            if self._rollouts is not None:
                self._rollouts.heard(states)

        self._treasury = treasury = await Treasury.open(loaded, tell, steer)
        observer.take_money(partial(money_figures, treasury.books, treasury.bookkeeper, treasury.journal, self._alerts))
        dice = Random()  # noqa: S311  (jitter and the ids of spans, no secrets)
        self.runtime = Runtime(
            plan=loaded.plan,
            server=settings.server,
            upstreams=dict(self._pools),
            books=treasury.books,
            bookkeeper=treasury.bookkeeper,
            journal=treasury.journal,
            observer=observer,
            standing=standing,
            alerts=self._alerts,
            dice=dice,
            tracing=Tracing(dice),
            effective=effective(loaded),
        )

        self._rollouts = rollouts = Rollouts(self.runtime)
        self._pilot = pilot = Pilot(self.runtime, ledger_path(settings), holder=treasury.journal.holder)
        rollouts.heard(await self._begin_rollouts(pilot))
        observer.take_rollouts(lambda: (*rollouts.figures(), *pilot.figures()))
        self._make_otlp(observer)

        def count(connections: int) -> None:
            observer.connections = connections

        server, store = settings.server, ledger_path(settings)
        self.admin = Listener(admin_app(self.runtime, store), server.admin, server, lambda _: None)
        self.data = Listener(data_app(self.runtime, store), server.data, server, count)
        await self.admin.start()
        await self.data.start()
        self._pilot.start()
        self._daily.start()
        if self.otlp is not None:
            self.otlp.start()

    async def reload(self) -> None:
        """Read the files again and swap what they say in; where they are wrong, keep what is and say why."""
        # One after the other, or what was read first could be put in force last.
        async with self._reloading:
            try:
                await self._reload()
            except Exception as error:
                # Whatever it was, calls go on, and whoever asks is told.
                is_bug = not isinstance(error, ConfigError | OSError)
                why = self.runtime.reload_error = str(error) or repr(error)
                self.runtime.observer.reloaded(ok=False)
                log.error("reload refused, the last good configuration stays in force:\n%s", why, exc_info=is_bug)

    async def _reload(self) -> None:
        runtime = self.runtime
        loaded = await asyncio.to_thread(self._load_again, self._loaded.settings)
        # First: a call of an experiment that this reload begins is to count in it.
        states = await self._found_or_begun(loaded.plan)
        await self._make_pools(loaded.settings.upstreams)
        runtime.upstreams = dict(self._pools)
        if self._treasury is not None:
            self._treasury.take_rules(loaded.plan.rules)
        self._alerts.take_policy(loaded.policy.alerting)
        self._daily.take_policy(loaded.policy.reports)
        runtime.standing.take_policy(loaded.policy.breakers, loaded.policy.retries)
        runtime.effective = effective(loaded)
        # Last: a call sees the old plan or the new one, and every upstream of either.
        if self._rollouts is not None and self._pilot is not None:
            self._rollouts.take_plan(loaded.plan, states)
        self._loaded = loaded
        runtime.reload_error, runtime.at_next_start = "", loaded.at_next_start
        runtime.observer.reloaded(ok=True)
        logging.getLogger("gateway").setLevel(loaded.policy.log.level.upper())
        log.info("configuration reloaded")
        if loaded.at_next_start:
            names = "], [".join(loaded.at_next_start)
            log.warning("not in force before the next start: what has changed in [%s]", names)

    async def stop(self) -> None:
        """Drain: no new calls, those in flight get `server.drain_s`, then everything is closed."""
        runtime = self.runtime
        runtime.is_draining = runtime.observer.is_draining = True
        drain_s = self._loaded.settings.server.drain_s
        since_s = time.monotonic()
        # The listener first: from here on nobody new is let in.
        others = [self._daily.stop(), *([self._pilot.stop()] if self._pilot is not None else [])]
        await asyncio.gather(self.data.stop(drain_s), *others)
        await runtime.end_lingering(drain_s - (time.monotonic() - since_s))
        await self.admin.stop(0.1)
        if self.otlp is not None:
            await self.otlp.close()
        for task in self._tasks:
            task.cancel()
        await self._close_pools()
        if self._treasury is not None:
            await self._treasury.close()
        await self._alerts.close()

    async def _close_pools(self) -> None:
        for pool in (*self._pools.values(), *self._retired):
            await pool.close()
        for simulator in self._simulators:
            await simulator.stop()

    def watch(self) -> None:
        """Reload on change."""
        paths = self._loaded.paths
        self._tasks.append(asyncio.create_task(watch_files((paths.config, paths.policies), self.reload)))

    async def _found_or_begun(self, plan: Plan) -> Mapping[tuple[str, str], RolloutState]:
        """Where the rollouts stand under a plan that is about to be in force; none where the store does not say."""
        if self._pilot is None:
            return {}
        try:
            return await self._pilot.begin(plan)
        except StoreError as error:
            log.error("rollouts that are new begin once the store is back, and count no call until then: %s", error)
            return {}

    async def _begin_rollouts(self, pilot: Pilot) -> Mapping[tuple[str, str], RolloutState]:
        try:
            return await pilot.begin(self._loaded.plan)
        except StoreError as error:
            raise CannotKeepBooks(str(error)) from error

    def _make_otlp(self, observer: Observer) -> None:
        otel = self._loaded.otel
        for complaint in otel.complaints:
            log.warning("%s", complaint)
        if otel.is_on:
            # Imported here: 10 MB and 90 ms that only those pay who export.
            from gateway.telemetry.otlp import OtlpExport

            self.otlp = OtlpExport(otel, env=self._loaded.env, plan=self._loaded.plan, observer=observer)
            if self.otlp.has_traces:
                sampling = otel.sampling
                self.runtime.tracing.export_to(
                    self.otlp.take, ratio=sampling.ratio, is_parent_based=sampling.is_parent_based
                )

    async def _make_pools(self, settings: Mapping[str, UpstreamSettings]) -> None:
        """A pool per upstream; those whose settings stay keep their connections."""
        before = self._loaded.settings.upstreams
        for name in [name for name in self._pools if settings.get(name) != before.get(name)]:
            # Calls in flight still use it; it is closed with the process.
            self._retired.append(self._pools.pop(name))
        for name, upstream in settings.items():
            if name in self._pools:
                continue
            base_url = upstream.base_url
            if upstream.kind == "simulator":
                # Imported here: a gateway with real providers need not carry it.
                from gateway.simulator.server import Simulator

                # One that was replaced goes on for the calls in flight.
                self._simulators.append(await Simulator.start(upstream.simulator))
                base_url = self._simulators[-1].base_url
            self._pools[name] = HttpUpstream(name, upstream, base_url)


async def serve(loaded: Loaded, load_again: Callable[[Settings], Loaded], announce: Callable[[Gateway], None]) -> None:
    """Run until SIGTERM or SIGINT; a second one ends at once."""
    gateway = Gateway(loaded, load_again)
    started = asyncio.Event()

    async def reload() -> None:
        await started.wait()
        await gateway.reload()

    # Before anything that takes time: a signal that nobody waits for would end the process.
    reload_on(signal.SIGHUP, reload)
    await gateway.start()
    started.set()
    gateway.watch()
    # What is alive now stays alive: the collector need not look at it again, which halves its pauses.
    gc.collect()
    gc.freeze()
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _on_stop, stopping)
    announce(gateway)
    await stopping.wait()
    log.info("draining")
    await gateway.stop()


def _on_stop(stopping: asyncio.Event) -> None:
    if stopping.is_set():
        raise SystemExit(1)
    stopping.set()
