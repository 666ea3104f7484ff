"""Who computes how much in the next step.

There is no prefill phase and no decode phase: each sequence has known tokens and computed ones, and gets
min(known - computed, what is left of the budget) until the budget is spent. Sequences that need one token come
first, so that a long prompt never holds up those that are being read; the rest of the budget goes to prompts in
order of arrival. When pages run out, the request that came last gives up its pages and computes again later, or finds
them again while nobody has taken them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Set
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

    def end(self, request: Request) -> None:
        """Ends a request, wherever it is; its pages are free at once. Harmless where it has ended already."""
        if not request.finished:
            self._release(request)
            (self.running if request in self.running else self.waiting).remove(request)
            request.sequences = []

    def schedule(self, depth: int = 1, under_way: Set[Request] = frozenset()) -> Schedule:
        """depth: how many steps share the requests, each a part of them. under_way: those that another step computes:
        they keep their pages, and go on where they have more tokens that are known."""
        step, budget = Schedule(), self.max_batch_tokens
        scheduled: set[Request] = set()
        share = -(-min(len(self.running) + len(self.waiting), self.max_sequences) // depth)
        short = False
        decoding_first = sorted(self.running, key=lambda r: any(s.pending > 1 for s in r.sequences))
        for request in decoding_first:
            self._count_found(request, self.prefixes.look_up(request))  # what others have computed since
            while budget and share and request in self.running and (work := request.takes(budget)):
                if self._grant(work, step):
                    scheduled.add(request)
                    budget -= sum(count for _, count in work)
                    share -= 1
                    break
                if request.forget_drafts():
                    continue
                short = True
                later = self.running[self.running.index(request) :]
                victim = next((r for r in reversed(later) if r not in scheduled and r not in under_way), None)
                if victim is None or (victim is request and (scheduled or under_way)):
                    break  # it keeps its pages and waits for those that run in this step
                self._preempt(victim)
        if not short:  # else newcomers would take the pages that a victim gave up, or that a running request waits for
            self._admit(step, budget, share)
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

    def undo(self, schedules: Iterable[Schedule]) -> None:
        """A step that broke off may have left pages uncopied or half written: all that took part compute again."""
        work = [part for schedule in schedules for part in schedule.work]
        for request in reversed(list(dict.fromkeys(sequence.request for sequence, _ in work))):
            if request in self.running:
                self._preempt(request)

    def _admit(self, step: Schedule, budget: int, share: int) -> None:
        places = self.max_sequences - sum(request.width for request in self.running)
        while self.waiting and budget > 0 and share > 0 and (self.waiting[0].width <= places or not self.running):
            request = self.waiting[0]
            if not (taken := self._start(request, step, budget)):
                break
            budget -= taken
            places -= request.width
            share -= 1

    def _start(self, request: Request, step: Schedule, budget: int) -> int:
        """Lets a request that waits run, with a part in this step: how many tokens; 0 where that cannot be now."""
        for sequence in request.sequences:
            sequence.table = self.pages.new_table()
        found = self.prefixes.look_up(request)
        work = request.takes(budget)
        if not work or not self._has_room(request) or not self._grant(work, step):
            self._release(request)
            return 0
        self.waiting.remove(request)
        self.running.append(request)
        self.prefixes.asked += sum(len(sequence.tokens) for sequence in request.sequences)
        self._count_found(request, found)
        return sum(count for _, count in work)

    def _count_found(self, request: Request, tokens: int) -> None:
        self.prefixes.found += tokens
        if not request.preempted:
            request.cached += tokens

    def _has_room(self, request: Request) -> bool:
        """Whether all that a request knows fits, and a page more for each sequence that runs: else it, or they, would
        soon be preempted and compute again."""
        if not self.running:
            return True
        growth = sum(len(other.sequences) for other in self.running) + len(request.sequences)
        whole = [(s.table, s.computed, len(s.tokens)) for s in request.sequences if s.table is not None]
        return self.pages.fits(whole, growth)

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
        request.preempted = True
        self.preemptions += 1

    def _release(self, request: Request) -> None:
        for sequence in request.sequences:
            if sequence.table is not None:
                self.pages.release(sequence.table)
            sequence.table, sequence.computed, sequence.unread, sequence.draft = None, 0, 0, []
