"""What the commands share: the options that say which configuration is meant, reading it, and failing in words.

A file of its own, so that commands may live in other files than main.py without an import cycle.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from gateway.config import ConfigError, Loaded, Paths, chosen_environment, load
from gateway.store.price_map import load_price_map

Command = Callable[..., Any]


def configured(command: Command) -> Command:
    """The options that say which configuration is meant."""
    options = (
        click.option(
            "--config", type=click.Path(path_type=Path), default=Path("config.toml"), show_default=True,
            help="The file of facts.",
        ),
        click.option(
            "--policies", type=click.Path(path_type=Path), default=Path("policies"), show_default=True,
            help="The folder of policies.",
        ),
        click.option("--env", help="The environment; if not given, GATEWAY_ENV, then GENESIS_ENV, then dev."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def share_or_exit(_: click.Context, argument: click.Parameter, percent: float | None) -> float | None:
    """A percentage that click's own range lets pass, and that is none: nan, or finer than users can be divided."""
    from gateway.decide.rollout_by_hand import wrong_percent

    if percent is not None and (wrong := wrong_percent(percent)):
        raise click.BadParameter(wrong, param=argument)
    return percent


def load_or_exit(config: Path, policies: Path, env: str | None, *, want_secrets: bool = True) -> Loaded:
    """The configuration, or its problems on the terminal and exit 1."""
    paths = Paths(config, policies)
    try:
        return load(paths, chosen_environment(env), litellm_map=load_price_map(), want_secrets=want_secrets)
    except ConfigError as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    """Say why on stderr, and exit 1."""
    click.echo(message, err=True)
    sys.exit(1)
