"""Who computes how much in the next step.

There is no prefill phase and no decode phase: each sequence has known tokens and computed ones, and gets
min(known - computed, what is left of the budget) until the budget is spent. Sequences that need one token come
first, so that a long prompt never holds up those that are being read; the rest of the budget goes to prompts in
order of arrival. When pages run out, the request that came last gives up its pages and computes again later, or finds
them again while nobody has taken them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from maestrale.engine.pages import Copy, Pages
from maestrale.engine.prefix import PrefixCache
from maestrale.engine.request import Request, Sequence
from maestrale.errors import OutOfPages


@dataclass
class Schedule:
    """One step: each sequence with the number of tokens it computes, and the page copies that come first."""

    work: list[tuple[Sequence, int]] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)


class Scheduler:
    """waiting: requests without pages, first come first. running: those with pages, in order of admission."""

    def __init__(self, pages: Pages, prefixes: PrefixCache, max_batch_tokens: int, max_sequences: int):
        self.pages, self.prefixes = pages, prefixes
        self.max_batch_tokens, self.max_sequences = max_batch_tokens, max_sequences
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.preemptions = 0

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Forget a request, wherever it is; its pages are free again."""
        self._release(request)
        (self.running if request in self.running else self.waiting).remove(request)

    def schedule(self) -> Schedule:
        step, budget = Schedule(), self.max_batch_tokens
        scheduled: set[Request] = set()
        short = False
        decoding_first = sorted(self.running, key=lambda r: any(s.pending > 1 for s in r.sequences))
        for request in decoding_first:
            self.prefixes.found += self.prefixes.look_up(request)  # what others have computed since
            while budget and request in self.running and (work := request.takes(budget)):
                if self._grant(work, step):
                    scheduled.add(request)
                    budget -= sum(count for _, count in work)
                    break
                short = True
                later = self.running[self.running.index(request) :]
                victim = next((r for r in reversed(later) if r not in scheduled), None)
                if victim is None or (victim is request and scheduled):
                    break  # it keeps its pages and waits for those that run in this step
                self._preempt(victim)
        if not short:  # else newcomers would take the pages that a victim gave up, or that a running request waits for
            self._admit(step, budget)
        return step

    def schedule_alone(self, request: Request) -> Schedule:
        """A step of one request, to which the others give way where pages are short."""
        step = Schedule()
        while True:
            if request in self.running:
                granted = self._grant(request.takes(self.max_batch_tokens), step)
            else:
                granted = self._start(request, step, self.max_batch_tokens) > 0
            others = [other for other in self.running if other is not request]
            if granted or not others:
                return step
            self._preempt(others[-1])

    def undo(self, schedule: Schedule) -> None:
        """A step that broke off may have left pages uncopied or half written: all that took part compute again."""
        for request in reversed(list(dict.fromkeys(sequence.request for sequence, _ in schedule.work))):
            self._preempt(request)

    def _admit(self, step: Schedule, budget: int) -> None:
        places = self.max_sequences - sum(request.width for request in self.running)
        while self.waiting and budget > 0 and (self.waiting[0].width <= places or not self.running):
            request = self.waiting[0]
            if not (taken := self._start(request, step, budget)):
                break
            budget -= taken
            places -= request.width

    def _start(self, request: Request, step: Schedule, budget: int) -> int:
        """Lets a request that waits run, with a part in this step: how many tokens; 0 where that cannot be now."""
        for sequence in request.sequences:
            sequence.table = self.pages.new_table()
        found = self.prefixes.look_up(request)
        work = request.takes(budget)
        if not work or not self._grant(work, step):
            self._release(request)
            return 0
        self.waiting.remove(request)
        self.running.append(request)
        self.prefixes.asked += sum(len(sequence.tokens) for sequence in request.sequences)
        self.prefixes.found += found
        return sum(count for _, count in work)

    def _grant(self, work: list[tuple[Sequence, int]], step: Schedule) -> bool:
        spans = [(s.table, s.computed, s.computed + count) for s, count in work if s.table is not None]
        try:
            step.copies += self.pages.grant(spans)
        except OutOfPages:
            return False
        step.work += work
        return True

    def _preempt(self, request: Request) -> None:
        self._release(request)
        self.running.remove(request)
        self.waiting.appendleft(request)
        self.preemptions += 1

    def _release(self, request: Request) -> None:
        for sequence in request.sequences:
            if sequence.table is not None:
                self.pages.release(sequence.table)
            sequence.table, sequence.computed = None, 0
