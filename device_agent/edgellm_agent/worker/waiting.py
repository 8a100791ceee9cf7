"""The queue of requests that wait for memory: bounded, and fair between clients.

Whoever has been served least comes next, by the virtual token counter of Sheng et al., "Fairness in Serving
Large Language Models", OSDI 2024; a client that was away does not save up its share.
"""

from __future__ import annotations

from collections.abc import Iterator

from edgellm_agent.worker.sequence import Sequence

# A generated token takes a step of its own; a prompt's come many to a step.
_PROMPT_WEIGHT = 1.0
_ANSWER_WEIGHT = 4.0
# Clients whose debts are remembered while they are away.
_REMEMBERED = 256


class WaitingQueue:
    """Sequences by client; each client's in the order of arrival, put-back ones before all others."""

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._queues: dict[str, list[Sequence]] = {}
        self._served: dict[str, float] = {}

    def add(self, sequence: Sequence, *, active: set[str], free: int) -> Sequence | None:
        """Queues a sequence.

        If more wait than may, the last of the client that waits with most must go: it is returned, and may
        be the new one.

        Args:
            sequence: The new one.
            active: Clients that run something now.
            free: Places that are free now, which the first in the queue will get at once.

        """
        self._lift(sequence.client, active)
        self._queues.setdefault(sequence.client, []).append(sequence)
        if len(self) <= self._max_waiting + free:
            return None
        # Of equals the newcomer goes: who waits already keeps the place.
        client = max(self._queues, key=lambda c: (len(self._queues[c]), c == sequence.client))
        last = self._queues[client][-1]
        # One that was put back has a reader who has seen a part of its answer.
        refused = sequence if last.timeline.started else last
        self.remove(refused)
        return refused

    def put_back(self, sequence: Sequence) -> None:
        """Returns one that had begun; it is its client's next, and does not count against the bound."""
        self._queues.setdefault(sequence.client, []).insert(0, sequence)

    def next(self) -> Sequence | None:
        """The first of the client that was served least; one whose reader takes nothing does not count."""
        ready = {c: s for c, q in self._queues.items() if (s := next((s for s in q if s.credit > 0), None))}
        client = min(ready, key=lambda c: self._served.get(c, 0.0), default=None)
        return None if client is None else ready[client]

    def remove(self, sequence: Sequence) -> None:
        """Takes one out, wherever it stands."""
        queue = self._queues[sequence.client]
        queue.remove(sequence)
        if not queue:
            del self._queues[sequence.client]

    def charge(self, client: str, *, prompt_tokens: int = 0, answer_tokens: int = 0) -> None:
        """Counts what a client was served."""
        cost = prompt_tokens * _PROMPT_WEIGHT + answer_tokens * _ANSWER_WEIGHT
        self._served[client] = self._served.get(client, 0.0) + cost

    def __iter__(self) -> Iterator[Sequence]:
        """All, client by client."""
        for queue in self._queues.values():
            yield from queue

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def _lift(self, client: str, active: set[str]) -> None:
        """A client that comes back begins where it was, or level with the least served of those here."""
        present = {*self._queues, *active}
        if client in present:
            return
        least = min((self._served.get(c, 0.0) for c in present), default=0.0)
        self._served[client] = max(self._served.get(client, 0.0), least)
        # Names come from outside and must not pile up: who is gone and owes nothing is forgotten, then who
        # owes least.
        gone = sorted((s, c) for c, s in self._served.items() if c not in present and c != client)
        for index, (served, name) in enumerate(gone):
            if served <= least or index < len(gone) - _REMEMBERED:
                del self._served[name]
