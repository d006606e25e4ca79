"""Which requests run, in which row, and which tokens each step takes. Holds no tensors and knows no model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from mta_ray.model.requests import Ticket


@dataclass(slots=True, eq=False)
class Running:
    """A request that owns a row."""

    ticket: Ticket
    tokens: list[int]
    """Prompt and answer so far."""
    cached: int = 0
    """How many of them have keys and values in the cache."""

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.ticket.request.prompt)


@dataclass(frozen=True, slots=True)
class Turn:
    """What one running request does in a step: `count` tokens from `cached` on."""

    row: int
    running: Running
    count: int

    @property
    def is_last_of_known(self) -> bool:
        """After these tokens a new one can be chosen."""
        return self.running.cached + self.count == len(self.running.tokens)


@dataclass(slots=True)
class Schedule:
    """Running requests by row, the decoding ones first, then those whose prompt is being read, oldest first."""

    rows: int
    tokens_per_step: int
    waiting: deque[Ticket] = field(default_factory=deque)
    running: list[Running] = field(default_factory=list)

    def admit(self) -> list[tuple[int, Running]]:
        """Waiting requests that got a row, oldest first."""
        taken = []
        while self.waiting and len(self.running) < self.rows:
            ticket = self.waiting.popleft()
            self.running.append(Running(ticket, list(ticket.request.prompt)))
            taken.append((len(self.running) - 1, self.running[-1]))
        return taken

    def plan(self) -> tuple[list[Turn], list[Turn]]:
        """Turns of decoding rows (all of them, one token each), and prompt chunks in what room is left."""
        decoding = [Turn(row, r, 1) for row, r in enumerate(self.running) if r.generated]
        room, chunks = self.tokens_per_step - len(decoding), []
        for row in range(len(decoding), len(self.running)):
            if room <= 0:
                break
            running = self.running[row]
            count = min(room, len(running.tokens) - running.cached)
            chunks.append(Turn(row, running, count))
            room -= count
        return decoding, chunks

    def remove(self, running: Running, move: Callable[[int, int, int], None]) -> int:
        """Take a request out; `move(source, target, cached tokens)` closes the gap. Returns the row that is now free.

        A gap among decoding rows takes the last decoding row; those still reading their prompt keep their order, as
        the oldest of them must be the first to decode.
        """
        gap = self.running.index(running)
        decoding = sum(1 for r in self.running if r.generated)
        if gap < decoding - 1:
            move(decoding - 1, gap, self.running[decoding - 1].cached)
            self.running[gap] = self.running[decoding - 1]
            gap = decoding - 1
        for row in range(gap + 1, len(self.running)):
            move(row, row - 1, self.running[row].cached)
            self.running[row - 1] = self.running[row]
        self.running.pop()
        return len(self.running)
