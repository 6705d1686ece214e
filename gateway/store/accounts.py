"""The rules a ledger counts by, and its accounts: made when somebody first asks, folded anew, let go when long over.

Begins no transaction: the caller has one. The invariant: an account that exists holds the sum of all rows that count
in it, also where its rule was not in force for a while.
"""

import sqlite3
from collections.abc import Iterable, Sequence

import msgspec

from gateway.decide.caps import Rule
from gateway.decide.windows import Window
from gateway.domain.ledger import Dimensions
from gateway.store.counting import Counted, fold, folds, load_rules
from gateway.store.leases import lost_in
from gateway.store.store import Ask

# Sums of windows that are over, and shares that were told, are kept a while for the clock that goes back.
KEPT_S = 2 * 86_400
# A process that has gone may come back with its journal.
_HOLDER_KEPT_S = 60 * 86_400
# No window but `total` is longer than this.
_LONGEST_S = 32 * 86_400

_ENCODE = msgspec.json.Encoder(order="deterministic").encode


def ids_of(rules: Iterable[Rule]) -> str:
    """The rules a process goes by, as its row among the holders has them."""
    return _ENCODE([rule.id for rule in rules]).decode()


def register(database: sqlite3.Connection, rules: Iterable[Rule]) -> None:
    """Have every row, whoever brings it, counted under these rules from now on."""
    known = {rule.id for rule in load_rules(database)}
    for rule in rules:
        database.execute("INSERT OR REPLACE INTO rules VALUES (?, ?, ?)", (rule.id, rule.env, _ENCODE(rule).decode()))
        if rule.id not in known:
            _fold_anew(database, rule)


def _fold_anew(database: sqlite3.Connection, rule: Rule) -> None:
    """Accounts of a rule that was not in force for a while have missed rows."""
    found = database.execute("SELECT account, start_s, end_s FROM accounts WHERE rule_id = ?", (rule.id,)).fetchall()
    for window in {Window(start_s, end_s) for _, start_s, end_s in found}:
        sums = folds(database, rule, window)
        for account, *span in found:
            if Window(*span) == window:
                counted = sums.get(account, Counted()).plus(lost_in(database, account, window))
                database.execute(
                    "UPDATE accounts SET posted = ?, in_doubt = ? WHERE account = ? AND start_s = ?",
                    (*counted, account, window.start_s),
                )


def retire(database: sqlite3.Connection, rules: Sequence[Rule], former_ids: Iterable[str]) -> None:
    """Forget rules of these environments that no process still goes by; those who are alive are all still asked.

    Their accounts stay, and are folded anew when the rule comes back.
    """
    envs = {rule.env for rule in rules}
    former = set(former_ids)
    needed = {rule.id for rule in rules}
    for (ids,) in database.execute("SELECT rule_ids FROM holders WHERE NOT is_lost"):
        needed.update(msgspec.json.decode(ids, type=list[str]))
    for rule in load_rules(database):
        if rule.id not in needed and (rule.env in envs or rule.id in former):
            database.execute("DELETE FROM rules WHERE rule_id = ?", (rule.id,))


def make_account(database: sqlite3.Connection, ask: Ask) -> None:
    """Make an account that nobody has asked for yet: the sum of what the ledger has for it."""
    rule, window = ask.rule, Window(ask.spot.start_s, ask.end_s)
    counted = fold(database, rule, ask.on, window).plus(lost_in(database, ask.spot.account, window))
    # Only what makes a call count here; who else the first caller was is no affair of the account.
    telling = {*rule.scope, *(name for name, _ in rule.only)}
    dims = Dimensions(*(value if name in telling else "" for name, value in ask.on._asdict().items()))
    database.execute(
        "INSERT INTO accounts (account, start_s, end_s, rule_id, env, unit, dims, posted, in_doubt) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*ask.spot, ask.end_s, rule.id, rule.env, rule.unit, _ENCODE(dims).decode(), *counted),
    )


def prune(database: sqlite3.Connection, now_ms: int) -> None:
    """Let go of sums of windows long over. The ledger keeps every row, so any of them can be folded again."""
    kept_s = now_ms // 1000 - KEPT_S
    database.execute(
        "DELETE FROM accounts WHERE end_s < ? AND NOT EXISTS "
        "(SELECT 1 FROM leases l WHERE l.account = accounts.account AND l.start_s = accounts.start_s)",
        (kept_s,),
    )
    # `total` begins at 0 and its shares are told once for ever.
    database.execute("DELETE FROM crossings WHERE start_s > 0 AND start_s < ?", (kept_s - _LONGEST_S,))
    database.execute("DELETE FROM holders WHERE is_lost AND seen_ms < ?", (now_ms - _HOLDER_KEPT_S * 1000,))
