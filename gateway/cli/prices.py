"""`gateway prices`: what every model in use costs, who says so, and what is missing. Prints; decides nothing."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import click

from gateway.cli.options import configured, load_or_exit
from gateway.config import Loaded
from gateway.decide.caps import Rule
from gateway.decide.prices import price_of
from gateway.domain.money import TOKENS_PER_MTOK, Price, Rates, format_usd

# Prices beside the three that have a column, by their field and how they are called.
_FURTHER = (
    ("cache_write_nusd_per_mtok", "cache write"),
    ("reasoning_nusd_per_mtok", "reasoning"),
    ("audio_input_nusd_per_mtok", "audio in"),
    ("audio_output_nusd_per_mtok", "audio out"),
)


class Row(NamedTuple):
    """One model and its price. `cap` is the cap in dollars that applies to it, if any; `agents` are those it serves."""

    model: str
    agents: tuple[str, ...]
    price: Price | None
    cap: str

    @property
    def is_refused(self) -> bool:
        """Whether calls to it are refused for want of a price."""
        return self.price is None and self.cap != ""

    @property
    def fix(self) -> str:
        """How to give it a price; nothing where it has one."""
        if self.price is not None:
            return ""
        return f'[prices."{self.model}"] in config.toml, with input_usd_per_mtok and output_usd_per_mtok'


@click.command()
@click.option(
    "--all", "show_all", is_flag=True, help="Also the written prices and patterns that no agent's model uses."
)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@configured
def prices(show_all: bool, as_json: bool, config: Path, policies: Path, env: str | None) -> None:
    """Show what the models cost, from where that is known, and what is missing.

    In dollars per million tokens. Exit status 1 where a model has no price though a cap in dollars applies to it: calls
    to it are refused.
    """
    import msgspec

    loaded = load_or_exit(config, policies, env, want_secrets=False)
    rows = rows_of(loaded)
    if show_all:
        shown = {(row.model, row.price) for row in rows}
        rows += [row for row in written(loaded) if (row.model, row.price) not in shown]
    if as_json:
        found = {"env": loaded.env, "models": [_as_json(row) for row in rows]}
        click.echo(msgspec.json.format(msgspec.json.encode(found)).decode())
    else:
        _print_table(loaded.env, rows)
    refused = [row.model for row in rows if row.is_refused]
    if refused:
        click.echo(f"refused for want of a price: {', '.join(dict.fromkeys(refused))}", err=True)
        sys.exit(1)


def rows_of(loaded: Loaded) -> list[Row]:
    """Every model that this environment may call, in the order of the agents' chains, once for each price it has."""
    plan = loaded.plan
    found: dict[tuple[str, Price | None], list[str]] = {}
    for agent in plan.agents.values():
        for target in (*(agent.finetuned if plan.use_finetuned else ()), *agent.baseline):
            # An agent may have a price of its own for a model that others call, too.
            served = found.setdefault((target.ref, target.price), [])
            if agent.name not in served:
                served.append(agent.name)
    for rule in plan.rules:
        cheaper = plan.targets.find(rule.use) if rule.use else None
        if cheaper is not None:
            found.setdefault((cheaper.ref, cheaper.price), [])
    return [
        Row(ref, tuple(agents), price, next((rule.label for rule in plan.rules if _binds(rule, ref, agents)), ""))
        for (ref, price), agents in found.items()
    ]


def written(loaded: Loaded) -> list[Row]:
    """Every price that is written down in the policy and in config.toml, by its pattern."""
    tables = (("policy", loaded.policy.prices), ("config.toml", loaded.settings.prices))
    return [Row(name, (), price_of(entry, source), "") for source, table in tables for name, entry in table.items()]


def _binds(rule: Rule, ref: str, agents: Iterable[str]) -> bool:
    """Whether the rule counts dollars and may count a call to this model."""
    only = dict(rule.only)
    is_of_model = "model" not in only or ref in only["model"]
    is_of_agent = "agent" not in only or bool(only["agent"] & set(agents))
    return rule.unit == "usd" and is_of_model and is_of_agent


def _as_json(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = {"model": row.model, "agents": row.agents, "cap": row.cap, "is_refused": row.is_refused}
    if row.price is None:
        return {**found, "price": None, "fix": row.fix}
    price = {**_rates_as_json(row.price), "source": row.price.source}
    for field in ("image_nusd", "request_nusd"):
        if getattr(row.price, field):
            price[field.replace("_nusd", "_usd")] = format_usd(getattr(row.price, field))
    if row.price.image_tokens is not None:
        price["image_tokens"] = row.price.image_tokens
    if row.price.audio_nusd_per_mseconds:
        price["audio_usd_per_minute"] = format_usd(_per_minute(row.price))
    if row.price.tiers:
        price["tiers"] = [{"above_tokens": tier.above_tokens, **_rates_as_json(tier)} for tier in row.price.tiers]
    return {**found, "price": price}


def _rates_as_json(rates: Rates) -> dict[str, Any]:
    values = {name: getattr(rates, name) for name in Rates.__struct_fields__}
    return {name.replace("_nusd", "_usd"): format_usd(value) for name, value in values.items() if value is not None}


def _per_minute(price: Price) -> int:
    return price.audio_nusd_per_mseconds * 60 // TOKENS_PER_MTOK


def _further(price: Price) -> str:
    """What has no column, in words."""
    found = [_named(price, field, name) for field, name in _FURTHER if getattr(price, field) is not None]
    if price.image_nusd:
        found.append(f"image {format_usd(price.image_nusd)} each")
    if price.image_tokens is not None:
        found.append(f"an image counts as {price.image_tokens} tokens at most")
    if price.audio_nusd_per_mseconds:
        found.append(f"audio {format_usd(_per_minute(price))} a minute")
    if price.request_nusd:
        found.append(f"request {format_usd(price.request_nusd)} each")
    for tier in price.tiers:
        rates = [f"{format_usd(tier.input_nusd_per_mtok)} in", f"{format_usd(tier.output_nusd_per_mtok)} out"]
        if tier.cached_input_nusd_per_mtok is not None:
            rates.append(f"{format_usd(tier.cached_input_nusd_per_mtok)} cached")
        rates += [_named(tier, field, name) for field, name in _FURTHER if getattr(tier, field) is not None]
        found.append(f"above {tier.above_tokens} tokens: {', '.join(rates)}")
    return "\n".join(found)


def _named(rates: Rates, field: str, name: str) -> str:
    return f"{name} {format_usd(getattr(rates, field))}"


def _print_table(env: str, rows: list[Row]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Into a file or a pipe nothing is cut and nothing is folded more than it must be.
    console = Console(width=None if sys.stdout.isatty() else 180, highlight=False)
    table = Table(box=SIMPLE_HEAD, title=f"{env}: dollars per million tokens", title_justify="left")
    table.add_column("model", overflow="fold")
    for name in ("input", "output", "cached"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("further", overflow="fold")
    table.add_column("from", overflow="fold")
    for row in rows:
        price = row.price
        if price is None:
            under = f" (calls are refused: {row.cap})" if row.is_refused else ""
            cells = (row.model, "MISSING", "", "", "", f"write {row.fix}{under}")
        else:
            cached = price.cached_input_nusd_per_mtok
            cells = (
                row.model, format_usd(price.input_nusd_per_mtok), format_usd(price.output_nusd_per_mtok),
                "" if cached is None else format_usd(cached), _further(price), price.source,
            )  # fmt: skip
        # As Text: a model's name may hold brackets, which are markup elsewhere.
        table.add_row(*map(Text, cells))
    console.print(table)
