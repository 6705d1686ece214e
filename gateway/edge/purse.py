"""The money of one call: a hold for each attempt, what became of it, and the lines of the journal that say so.

Every attempt is reserved before its provider hears of it, and ended once: posted, void or in doubt. The invariants: no
attempt begins without its hold in the journal, and nothing is told to the ledger that is not.
"""

import time
from typing import NamedTuple

import msgspec

from gateway.decide.bound import (
    PromptBound,
    Weight,
    affordable_max_tokens,
    bound_of,
    completion_bound,
    estimate,
    hides_reasoning,
    most_nusd,
    weigh,
)
from gateway.decide.budget import Hold, Shortfall
from gateway.decide.plan import Plan
from gateway.decide.targets import Target
from gateway.domain.call import Basis, CallRecord
from gateway.domain.errors import Refused
from gateway.domain.ledger import Amounts, Dimensions, Held, InDoubt, LedgerRow, Line, Posted, Void, row_of
from gateway.domain.money import Usage, cost_nusd
from gateway.domain.wire import Fields
from gateway.edge.bookkeeper import Spent
from gateway.edge.runtime import Runtime

_FINAL = {"x-should-retry": "false"}


class _Open(NamedTuple):
    """The attempt that is under way: its model, its bound, its hold, and the hold as the journal has it."""

    target: Target
    prompt: PromptBound
    hold: Hold
    held: Held


class Ended(NamedTuple):
    """What an attempt's money came to."""

    amounts: Amounts
    basis: Basis
    is_in_doubt: bool = False


class Purse:
    """What one call may spend, and has spent."""

    def __init__(self, runtime: Runtime, plan: Plan, call_id: str) -> None:
        self._runtime = runtime
        self._plan = plan
        self._call_id = call_id
        self._attempts = 0
        # For what others hold and for the disk; it is not our own share of a call's time.
        self.waited_s = 0.0
        # The output limit of a choice as it was asked for, and as the budget lets the attempt under way have it.
        self.asked_max_tokens = self.max_tokens = 0
        self.n = 1
        self._fields: Fields = {}
        self._weight: Weight | None = None
        # Requests that are still to be counted for this call.
        self._requests = 1
        self._open: _Open | None = None
        self._on = Dimensions()
        self._books_version = runtime.books.version
        # Events that are not in the journal yet, and rows that follow from them.
        self._lines: list[Line] = []
        self._resolved: list[tuple[LedgerRow, Spent]] = []

    def fill(self, fields: Fields, max_tokens: int, n: int) -> None:
        """Note what is going to be sent, which bounds what it can cost."""
        self._fields, self.n = fields, n
        self.asked_max_tokens = self.max_tokens = max_tokens

    @property
    def is_open(self) -> bool:
        """Whether an attempt is under way."""
        return self._open is not None

    @property
    def is_clamped(self) -> bool:
        """Whether the answer is held shorter than was asked for."""
        return self.max_tokens < self.asked_max_tokens

    # --- Before an attempt -------------------------------------------------------------------------------------------

    async def reserve(self, target: Target, on: Dimensions, *, left_s: float) -> None:
        """Hold the most an attempt at `target` can cost, in every account, and write it down.

        Raises `Refused`; then nothing is held. What a cap is short of is waited for, and then clamped to, as the policy
        has it.
        """
        runtime, budget = self._runtime, self._plan.budget
        if self._weight is None:
            self._weight = weigh(self._fields)
        prompt = bound_of(self._weight, target)
        self.max_tokens = self.asked_max_tokens
        came_s = time.perf_counter()
        until_s = came_s + min(budget.wait_ms / 1000, left_s)
        while True:
            # Also of a call that has waited.
            stop = runtime.bookkeeper.stopped(self._plan.env, on)
            if stop is not None:
                # The reason is meant for callers; who gave it is in the audit log.
                raise Refused("spending_stopped", f"spending is stopped: {stop.why}", headers=_FINAL)
            bound = self._bound(target, prompt)
            now_s = time.time()
            found = runtime.books.reserve(on, bound, is_priced=target.price is not None, now_s=now_s)
            if isinstance(found, Hold):
                break
            if found.needs_price:
                message = f"no price is known for {target.ref}, and a cap applies: {found.account.rule.label}"
                raise Refused("model_not_priced", message, headers=_FINAL)
            if await self._find_headroom(found, came_s, until_s):
                continue
            if budget.when_short == "refuse" or not self._clamp(target, prompt, on):
                raise _short(found, now_s, budget.exceeded_status)
        await self._begin(target, prompt, on, found, bound)

    async def _begin(self, target: Target, prompt: PromptBound, on: Dimensions, hold: Hold, bound: Amounts) -> None:
        """Write the hold down; only then may the provider hear of the attempt."""
        runtime = self._runtime
        self._attempts += 1
        # In the hold's own windows, whatever the clock says by now.
        held = Held(f"{self._call_id}.{self._attempts}", hold.at_ms, self._plan.env, on, bound)
        self._lines.append(held)
        try:
            self.write()
        except Refused:
            self._lines.remove(held)
            runtime.books.void(hold)
            raise
        self._open, self._on = _Open(target, prompt, hold, held), on
        since_s = time.perf_counter()
        try:
            await runtime.journal.flushed()
        except BaseException:
            # The disk failed or the caller left, and nothing has been sent.
            self.void()
            raise
        self.waited_s += time.perf_counter() - since_s
        runtime.bookkeeper.headroom.passed_on(hold)

    async def _find_headroom(self, short: Shortfall, came_s: float, until_s: float) -> bool:
        since_s = time.perf_counter()
        try:
            return await self._runtime.bookkeeper.headroom.find(short, came_s=came_s, wait_s=until_s - since_s)
        finally:
            self.waited_s += time.perf_counter() - since_s

    def _bound(self, target: Target, prompt: PromptBound) -> Amounts:
        """The most an attempt at `target` can take, in each unit."""
        completion = completion_bound(prompt, self.max_tokens, self.n)
        nusd = most_nusd(target.price, prompt, completion) if target.price is not None else 0
        return Amounts(nusd, self._requests, prompt.tokens + completion)

    def _clamp(self, target: Target, prompt: PromptBound, on: Dimensions) -> bool:
        """Lower the output limit to what can be paid now, or else to what could be once nothing is held any more."""
        books, least = self._runtime.books, self._plan.budget.min_tokens
        for is_in_time in (False, True):
            nusd, tokens = books.affordable(on, now_s=time.time(), is_in_time=is_in_time)
            fits = affordable_max_tokens(target.price, prompt, self.n, money_nusd=nusd, tokens_left=tokens)
            if least <= fits < self.max_tokens:
                self.max_tokens = fits
                return True
        return False

    def why_to_stop(self) -> str:
        """Why a stream that is under way must not go on, though nothing is wrong with it; empty: it may."""
        bookkeeper, books, opened = self._runtime.bookkeeper, self._runtime.books, self._open
        if opened is None:
            return ""
        if bookkeeper.stops:
            stop = bookkeeper.stopped(self._plan.env, opened.held.on)
            if stop is not None:
                return f"spending is stopped: {stop.why}"
        if books.version != self._books_version and books.is_revoked(opened.hold):
            return "its cap was lowered below what is spent"
        return ""

    # --- The ends of an attempt --------------------------------------------------------------------------------------

    def post(self, usage: Usage) -> Ended | None:
        """It used this much; None where no attempt is under way, as for all ends."""
        opened = self._open
        if opened is None:
            return None
        price = opened.target.price
        nusd = cost_nusd(price, usage, images=opened.prompt.images) if price is not None else 0
        return self._post(opened, nusd, usage, "exact")

    def post_estimate(self, content_bytes: int, content_events: int, *, ran_over: bool = False) -> Ended | None:
        """Nobody said what it used: what came, counted upwards."""
        opened = self._open
        if opened is None:
            return None
        if hides_reasoning(opened.target) and not ran_over:
            # What it thought is in no event.
            return self.post_bound()
        prompt, price = opened.prompt, opened.target.price
        most = completion_bound(prompt, self.max_tokens, self.n)
        used = estimate(prompt, events=content_events, content_bytes=content_bytes, most_tokens=most, ran_over=ran_over)
        if ran_over and used.completion_tokens < most:
            # It went beyond its limit, by how much nobody says; what it hid is not counted at all.
            used = msgspec.structs.replace(used, completion_tokens=most)
        nusd = most_nusd(price, prompt, used.completion_tokens) if price is not None else 0
        return self._post(opened, nusd, used, "estimate")

    def post_bound(self) -> Ended | None:
        """Nobody knows what it used, and nobody will say: the whole hold."""
        opened = self._open
        if opened is None:
            return None
        return self._settle(opened, Posted(opened.held.id, opened.held.amounts, "bound"))

    def doubt(self) -> Ended | None:
        """It may have cost the whole hold; the provider's bill will tell."""
        opened = self._open
        if opened is None:
            return None
        self._runtime.books.doubt(opened.hold)
        return self._end(opened, InDoubt(opened.held.id), Ended(opened.held.amounts, "bound", is_in_doubt=True))

    def void(self) -> Ended | None:
        """It cannot have cost anything."""
        opened = self._open
        if opened is None:
            return None
        self._runtime.books.void(opened.hold)
        return self._end(opened, Void(opened.held.id), Ended(Amounts(), "none"))

    def _post(self, opened: _Open, nusd: int, usage: Usage, basis: Basis) -> Ended:
        prompt_tokens, completion_tokens = usage.prompt_tokens, usage.completion_tokens
        amounts = Amounts(nusd, opened.held.amounts.requests, prompt_tokens + completion_tokens)
        return self._settle(opened, Posted(opened.held.id, amounts, basis, prompt_tokens, completion_tokens))

    def _settle(self, opened: _Open, posted: Posted) -> Ended:
        self._runtime.observer.overshoot_nusd += self._runtime.books.settle(opened.hold, posted.amounts)
        return self._end(opened, posted, Ended(posted.amounts, posted.basis))

    def _end(self, opened: _Open, line: Posted | Void | InDoubt, ended: Ended) -> Ended:
        """Note the end, for the journal first and then for the ledger."""
        self._open = None
        self._lines.append(line)
        spent = tuple([(account, account.rule.amount(ended.amounts)) for account, _ in opened.hold.entries])
        self._resolved.append((row_of(opened.held, line), spent))
        # A call is one request, however many tries it takes; one that was void was none.
        self._requests -= ended.amounts.requests
        return ended

    # --- The journal -------------------------------------------------------------------------------------------------

    def write(self) -> None:
        """What has happened so far into the journal, by one write; then it may be told to the ledger.

        Raises `Refused` where the journal does not take it.
        """
        self._runtime.journal.append(*self._lines)
        self._lines = []
        for row, spent in self._resolved:
            self._runtime.bookkeeper.resolved(row, spent)
        self._resolved = []

    def close(self, record: CallRecord | None) -> None:
        """Write the last lines, the call's own record with them. What the disk does not take now it gets later.

        Raises `Refused` then.
        """
        bookkeeper = self._runtime.bookkeeper
        if record is not None:
            self._lines.append(record)
        try:
            self.write()
        except Refused:
            bookkeeper.owe(self._lines, self._resolved)
            raise
        if record is not None:
            bookkeeper.recorded(record)

    def remaining_nusd(self) -> int | None:
        """What is left of the tightest cap in dollars on the last attempt; None without one."""
        return self._runtime.books.remaining_nusd(self._on, now_s=time.time())


def _short(short: Shortfall, now_s: float, exceeded_status: int) -> Refused:
    """The refusal of a call for which there is no money."""
    account = short.account
    if short.is_only_held:
        message = f"what is left is held by calls in flight: {account.rule.label}"
        return Refused("budget_reserved", message, headers={"retry-after-ms": "500", "x-should-retry": "true"})
    headers = dict(_FINAL)
    if account.end_s is not None:
        headers["Retry-After"] = str(max(1, round(account.end_s - now_s)))
    message = f"the cap is used up: {account.rule.label}"
    return Refused("budget_exceeded", message, status=exceeded_status, headers=headers)
