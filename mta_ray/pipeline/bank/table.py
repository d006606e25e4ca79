"""The training of a bank as a person reads it: a table with a row for each group, and the same in one line."""

from __future__ import annotations

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from mta_ray.console import duration
from mta_ray.pipeline.bank.snapshot import GroupRow, Snapshot

_STYLES = {"starting": "yellow", "training": "", "lost": "red", "ended": "dim"}
_ORDER = ("lost", "training", "starting", "ended")
"""Which groups are shown where not all have room."""


def bank_table(name: str, snapshot: Snapshot, rows: int) -> Group:
    """Groups as rows, at most so many, above their sums and what is left to do."""
    shown = sorted(sorted(snapshot.groups, key=lambda row: _ORDER.index(row.state))[:rows], key=lambda row: row.group)
    hidden = len(snapshot.groups) - len(shown)
    busy, lanes = _lanes(snapshot)
    table = Table(
        box=box.SIMPLE_HEAD,
        show_footer=True,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    running = [row for row in snapshot.groups if _runs(row)]
    for head, sums, side in (
        ("group", f"{len(running):,} of {len(snapshot.groups):,}", "left"),
        ("state", f"{hidden:,} more" if hidden else "", "left"),
        ("devices", f"{sum(row.devices for row in running):,}", "right"),
        ("lanes", f"{busy:,}/{lanes:,}", "right"),
        ("done", f"{sum(row.adapters_done for row in snapshot.groups):,}", "right"),
        ("tokens/s", f"{snapshot.tokens_per_s:,.0f}", "right"),
        ("loss", _loss(mean_loss(snapshot)), "right"),
    ):
        table.add_column(head, sums, justify=side, no_wrap=head != "state")  # type: ignore[arg-type]
    for row in shown:
        table.add_row(
            str(row.group),
            Text(_state(row), no_wrap=True, overflow="ellipsis"),  # the one that gives way where room is short
            f"{row.devices:,}",
            f"{row.lanes_busy:,}/{row.lanes:,}",
            f"{row.adapters_done:,}",
            f"{row.tokens_per_s:,.0f}",
            _loss(row.loss),
            style=_STYLES[row.state],
        )
    return Group(table, Text(bank_line(name, snapshot)))


def bank_line(name: str, snapshot: Snapshot) -> str:
    """`train bank: 5/14 adapters, 1 failed, 2 groups, 9/10 lanes, 12,300 tokens/s, loss 1.234, 40 s left`.

    After the last group's end the tokens per second are those of the whole time.
    """
    words = [f"{name}: {snapshot.adapters_done:,}/{snapshot.adapters:,} adapters"]
    if snapshot.failures:
        words.append(f"{len(snapshot.failures):,} failed")
    if snapshot.is_over:
        words.append(f"{snapshot.tokens / max(snapshot.elapsed_s, 1e-9):,.0f} tokens/s")
        words.append(f"{duration(snapshot.elapsed_s)} in all")
        return ", ".join(words)

    running = sum(_runs(row) for row in snapshot.groups)
    busy, lanes = _lanes(snapshot)
    words.append(f"{running:,} group{'' if running == 1 else 's'}")
    words.append(f"{busy:,}/{lanes:,} lanes")
    words.append(f"{snapshot.tokens_per_s:,.0f} tokens/s")
    loss = mean_loss(snapshot)
    if loss is not None:
        words.append(f"loss {_loss(loss)}")
    eta_s = snapshot.eta_s
    words.append(f"{duration(snapshot.elapsed_s)} so far" if eta_s is None else f"{duration(eta_s)} left")
    return ", ".join(words)


def mean_loss(snapshot: Snapshot) -> float | None:
    """Of the adapters in training, in nats: the groups' means, each with the weight of its busy lanes."""
    told = [(row.loss, row.lanes_busy) for row in snapshot.groups if row.loss is not None and row.lanes_busy]
    return sum(loss * busy for loss, busy in told) / sum(busy for _, busy in told) if told else None


def _lanes(snapshot: Snapshot) -> tuple[int, int]:
    """(busy, all) of the groups that run."""
    running = [row for row in snapshot.groups if _runs(row)]
    return sum(row.lanes_busy for row in running), sum(row.lanes for row in running)


def _runs(row: GroupRow) -> bool:
    return row.state in ("starting", "training")


def _state(row: GroupRow) -> str:
    return f"{row.state}: {' '.join(row.reason.split())}" if row.reason else row.state


def _loss(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.3f}"
