"""The demo: real questions, asked by many users through the real openai SDK, and a table of what came of it.

A gateway of the shipped policy runs in a process of its own, on the simulator: no key, no cost, no real model. The
table comes from the gateway's journal; that callers, journal and metrics agree is checked and printed. The invariant:
it ends well only where every check holds.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import aiohttp
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from gateway.domain.call import CallRecord
from gateway.domain.money import NUSD_PER_USD
from gateway.lab.agreement import check_all
from gateway.lab.callers import Answer, converse_all
from gateway.lab.questions import Conversation, Question, deal
from gateway.lab.tally import Row, exposures, percentile, summed, tally
from gateway.lab.trial_gateway import Tables, TrialGateway, trial_gateway
from gateway.store.journal import journal_files
from gateway.store.journal_reader import read_calls

QUICK_USERS = 10
QUICK_QUESTIONS = 8
CONVERSATIONS_EACH = 4
AT_ONCE = 50
# The agent with the most questions, so that fallbacks are seen even while few users get its fine-tuned model.
FAULTY_AGENT = "qa_agent"
FAULT = "503@0.2"
# Wide enough for the table where the output is a file.
FILE_COLUMNS = 100


class Order(NamedTuple):
    """What is to be run."""

    tables: Tables
    questions: Sequence[Question]
    users: int
    share_percent: float | None = None


class Outcome(NamedTuple):
    """What callers, journal and metrics say when all is asked."""

    answers: list[Answer]
    records: list[CallRecord]
    torn: int
    journal: bytes
    metrics: str
    log: str
    took_s: float


def quick(questions: Sequence[Question]) -> Sequence[Question]:
    """A few questions from all over the file, for a run of seconds."""
    return questions[:: max(1, len(questions) // QUICK_QUESTIONS)][:QUICK_QUESTIONS]


def console() -> Console:
    """Where the demo is shown: as wide as the terminal, or wide enough."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=FILE_COLUMNS)


async def run_demo(order: Order, screen: Console) -> bool:
    """Run, show, and say whether all checks held. Raises `TrialFailed`, `SdkMissing`."""
    conversations = deal(order.questions, users=order.users, each=CONVERSATIONS_EACH)
    faults = faults_for(order.tables)
    announce(order, conversations, faults, screen)
    async with trial_gateway(order.tables, share_percent=order.share_percent, faults=faults) as gateway:
        outcome = await ask_all(gateway, conversations, screen)
    show_calls(outcome, screen)
    show_exposure(outcome.records, screen)
    show_routes(outcome.answers, screen)
    return show_checks(outcome, order.tables, screen)


def faults_for(tables: Tables) -> dict[str, str]:
    """Who fails on purpose; nobody where no other model would step in."""
    agents = tables.config["agents"]
    return {FAULTY_AGENT: FAULT} if tables.has_finetuned_with_fallback and FAULTY_AGENT in agents else {}


async def ask_all(gateway: TrialGateway, conversations: Sequence[Conversation], screen: Console) -> Outcome:
    """Hold the conversations under a progress bar, then collect what everybody knows of them."""
    columns = (
        TextColumn("asking"), BarColumn(), MofNCompleteColumn(), TextColumn("answers, {task.fields[errors]} errors"),
        TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=screen) as progress:
        turns = sum(len(conversation.question.turns) for conversation in conversations)
        bar = progress.add_task("asking", total=turns, errors=0)
        errors = 0

        def told(answer: Answer) -> None:
            nonlocal errors
            errors += bool(answer.error)
            progress.update(bar, advance=1, errors=errors)

        since_s = time.perf_counter()
        answers = await converse_all(f"{gateway.data_url}/v1", conversations, at_once=AT_ONCE, told=told)
        took_s = time.perf_counter() - since_s
    lines = await asyncio.to_thread(lambda: list(read_calls(gateway.journal)))
    # Shadow calls are nobody's answers.
    records = [line for line in lines if isinstance(line, CallRecord) and not line.shadow_of]
    async with aiohttp.ClientSession() as session, session.get(f"{gateway.admin_url}/metrics") as reply:
        metrics = await reply.text()
    journal = await asyncio.to_thread(lambda: b"".join(path.read_bytes() for path in journal_files(gateway.journal)))
    log = await asyncio.to_thread(gateway.log.read_text)
    torn = sum(not isinstance(line, CallRecord) for line in lines)
    return Outcome(answers, records, torn, journal, metrics, log, took_s)


def announce(order: Order, conversations: Sequence[Conversation], faults: dict[str, str], screen: Console) -> None:
    """Say what is going to happen, and what of it is not real."""
    turns = sum(len(conversation.question.turns) for conversation in conversations)
    screen.print(f"Genesis Gateway, policy {order.tables.env!r}, on the built-in simulator: no key, no real model.")
    screen.print(
        f"{order.users} users ask {len(order.questions)} questions of MT-bench in {len(conversations)} conversations, "
        f"{turns} calls in all,\nthrough the openai SDK, model 'auto', every second conversation as a stream, "
        f"{AT_ONCE} at once."
    )
    for agent, fault in faults.items():
        name, _, rate = fault.partition("@")
        screen.print(f"On purpose: {agent}'s fine-tuned model answers {name} to {float(rate):.0%} of its requests.")


def show_calls(outcome: Outcome, screen: Console) -> None:
    """The table per agent and variant."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("agent", "variant"):
        table.add_column(name, vertical="bottom", overflow="fold")
    for name in (
        "calls",
        "share",
        "p50\nms",
        "p95\nms",
        "tokens\nin",
        "tokens\nout",
        "cost\n$",
        "fall-\nbacks",
        "errors",
    ):
        table.add_column(name, justify="right", vertical="bottom", overflow="fold")
    rows = tally(outcome.records)
    for row in rows:
        table.add_row(*cells(row))
    table.add_section()
    total = len(outcome.records)
    table.add_row(*cells(summed("all", "", outcome.records, of=total)))
    screen.print()
    screen.print(table)
    own_ms = [record.overhead_ms for record in outcome.records]
    screen.print(
        f"\n{total} calls in {outcome.took_s:.1f} s, {total / outcome.took_s:.0f} per second; "
        f"not waiting for a model: p50 {percentile(own_ms, 0.5):.1f} ms, p95 {percentile(own_ms, 0.95):.1f} ms.\n"
        "Gateway and simulator share one process and the machine with the SDK; `make bench` measures the gateway alone."
    )


def cells(row: Row) -> tuple[str, ...]:
    """A row as text. `share` is of the agent's calls; dollars are rounded, for the eye only."""
    return (
        row.agent, row.variant, str(row.calls), f"{row.share:.1%}", f"{row.p50_ms:.0f}", f"{row.p95_ms:.0f}",
        str(row.input_tokens), str(row.output_tokens), f"{row.cost_nusd / NUSD_PER_USD:.6f}",
        str(row.fallbacks), str(row.errors),
    )  # fmt: skip


def show_exposure(records: Sequence[CallRecord], screen: Console) -> None:
    """How many users each experiment treated, beside how many it meant to."""
    found = exposures(records)
    title = "Users who get the fine-tuned model, of those who came to the agent:" if found else "No experiment ran."
    screen.print(f"\n{title}")
    for one in found:
        screen.print(
            f"  {one.agent:<14} {one.treated:>3} of {one.users:<3}  {one.treated / one.users:>5.1%}"
            f"   (the share is {one.share_bps / 100:g} %)"
        )


def show_routes(answers: Sequence[Answer], screen: Console) -> None:
    """Where the router sent each question's first turn, by the kind of question, and one reason in full."""
    told = sorted(answers, key=lambda answer: answer.conversation.question.question_id)
    firsts = {answer.conversation.question: answer for answer in told if answer.turn == 1 and answer.agent}
    counts = Counter((question.category, answer.agent) for question, answer in firsts.items())
    agents = sorted({agent for _, agent in counts})
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("questions")
    for agent in agents:
        table.add_column(agent, justify="right")
    for category in dict.fromkeys(question.category for question in firsts):
        table.add_row(category, *(str(counts[category, agent] or "") for agent in agents))
    table.add_section()
    table.add_row("all", *(str(sum(counts[kind, name] for kind, name in counts if name == agent)) for agent in agents))
    screen.print("\nWhere the router sent the questions, by MT-bench's categories:\n")
    screen.print(table)
    if firsts:
        question, answer = next(iter(firsts.items()))
        screen.print(f"\nFor example, {question.turns[0][:70]!r}...", markup=False)
        screen.print(
            f"  x-gateway-agent: {answer.agent}\n  x-gateway-route: {answer.route}\n", markup=False, soft_wrap=True
        )


def show_checks(outcome: Outcome, tables: Tables, screen: Console) -> bool:
    """A line per check, and where one fails the gateway's own words; whether all hold."""
    checks = check_all(outcome.answers, outcome.records, outcome.metrics, outcome.journal, tables.salts)
    for check in checks:
        screen.print(f"{'ok    ' if check.holds else 'FAILED'}  {check.what}", markup=False, soft_wrap=True)
    if outcome.torn:
        screen.print(f"FAILED  {outcome.torn} lines of the journal are torn")
    all_hold = not outcome.torn and all(check.holds for check in checks)
    if not all_hold and outcome.log:
        screen.print(f"\nThe gateway's log:\n{outcome.log}", markup=False, soft_wrap=True)
    return all_hold
