"""Continuous batching: requests go in, tokens come out, one step at a time; no thread, no clock, no torch."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import NoReturn

import numpy as np

from maestrale.batch import Asynchronous, Rows, Runner, StepOutput
from maestrale.engine.assemble import assemble
from maestrale.engine.checks import check_prompt, check_width
from maestrale.engine.confine import Suspects, as_ours
from maestrale.engine.counters import Counters, PoolCounters
from maestrale.engine.drawing import draws_for
from maestrale.engine.growth import Growth
from maestrale.engine.pages import Pages
from maestrale.engine.prefix import PrefixCache
from maestrale.engine.request import Completion, Request, Row, Sequence
from maestrale.engine.scheduler import Schedule, Scheduler
from maestrale.engine.speculation import Speculation
from maestrale.errors import DistributedError, RequestError
from maestrale.sampling.params import SamplingParams
from maestrale.sampling.policy import token_logprob
from maestrale.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Part:
    """What one sequence has of a step. wanted: positions whose logits are. drafted: how many of its tokens were
    guessed. end: how many of its tokens are computed after it, those not counted. last: whether the next one comes of
    it."""

    wanted: range
    drafted: int
    end: int
    last: bool


@dataclass(frozen=True)
class Step:
    """A batch that is under way. output: waits for what it brings. drawn: whether all that is wanted of it is tokens
    that the runner draws, so that its sequences may go on before anybody has read them."""

    schedule: Schedule
    parts: dict[Sequence, Part]
    output: Callable[[], StepOutput]
    drawn: bool

    def last_rows(self) -> dict[Sequence, int]:
        """For each sequence the last of its rows in the step's output."""
        ends = accumulate(len(part.wanted) for part in self.parts.values())
        return dict(zip(self.parts, (end - 1 for end in ends), strict=True))


class Engine:
    """Drives one runner. `submit` queues a request, `step` does one batch and gives what is new in it.

    prefix_cache: whether a prompt may begin on the pages of an earlier one that began alike. speculate: whether what
    a text has said before may be tried again. No text depends on either. adapters: the names of the runner's, in its
    order.
    """

    def __init__(
        self,
        runner: Runner,
        vocab_size: int,
        tokenizer: Tokenizer | None,
        max_sequences: int,
        adapters: Items[str] = (),
        *,
        prefix_cache: bool = True,
        speculate: bool = True,
    ):
        self.runner, self.vocab_size, self.tokenizer, self.adapters = runner, vocab_size, tokenizer, tuple(adapters)
        self.pages = Pages(runner.layout)
        self.prefixes = PrefixCache(self.pages, prefix_cache)
        self.scheduler = Scheduler(self.pages, self.prefixes, runner.layout.max_chunk, max_sequences)
        self._asynchronous = runner if isinstance(runner, Asynchronous) and runner.depth > 1 else None
        self._depth = 1 if self._asynchronous is None else self._asynchronous.depth
        self._draws = self._asynchronous is not None and self._asynchronous.draws
        self.speculation = Speculation(runner.layout.max_chunk, speculate and self._depth == 1)
        self.growth = Growth(self.scheduler, self.speculation, vocab_size, tokenizer)
        self.suspects = Suspects()
        self._under_way: deque[Step] = deque()
        self._in_step = [0] * len(self.pages.pools)
        self.steps = self.tokens_in = self.tokens_out = self.failed = self.failed_steps = 0

    def submit(
        self,
        prompt: Items[int],
        params: SamplingParams,
        *,
        chunk_size: int | None = None,
        keep_logits: bool = False,
        reply: bool = False,
        namespace: str = "",
        adapter: str | None = None,
    ) -> Request:
        """Queues a prompt of token ids. RequestError where it cannot be served, with the offending `param`.

        chunk_size: the most prompt tokens to compute in a step. keep_logits: keep every row of logits.
        reply: the completion's text begins anew, as a chat's answer does, and does not go on from the prompt's: no
        space between the two is part of it. namespace: who may share cached pages with it: requests of the same one
        and the same adapter. adapter: the name of the one to go through; None is the model alone.
        """
        layout = self.runner.layout
        check_prompt(prompt, params, self.vocab_size, self.tokenizer, layout.max_len)
        request = Request(
            prompt,
            params,
            seed=int.from_bytes(os.urandom(8)) >> 1 if params.seed is None else params.seed,
            length_limit=min(len(prompt) + params.max_tokens, layout.max_len),
            chunk=min(chunk_size or layout.max_chunk, layout.max_chunk),
            keep_logits=keep_logits,
            reply=reply,
            namespace=f"{adapter!r}/{namespace}",
            adapter=self._adapter(adapter),
        )
        check_width(request, layout)
        self.growth.prepare(request.sequences[0])
        self.scheduler.add(request)
        self.tokens_in += len(prompt)
        return request

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running)

    def abort(self, request: Request) -> None:
        """Ends a request; its pages are free at once. Harmless where it has ended already."""
        self.scheduler.end(request)

    def step(self) -> list[tuple[Request, Completion]]:
        """One batch. Gives, for each sequence that went on, what was added to it, as a Completion.

        A request that failed has its `error` set and no pages any more; the others are not touched. When a step
        fails, the next ones compute its requests one by one, and only who fails alone is at fault.

        An asynchronous runner is given further batches first: one of several stages those of other sequences, until
        all its stages have one; one that draws tokens the next batch of the same ones, so that it is ready when the
        step that is read here has ended. Who has ended by then has computed a token too many, which nobody sees.
        """
        while len(self._under_way) < self._depth and self._begin():
            pass
        return self._end(self._under_way.popleft()) if self._under_way else []

    def _begin(self) -> bool:
        """Puts a step under way, where there is anything to compute and it need not wait for those under way."""
        before = self._under_way[-1] if self._under_way else None
        suspect = self.suspects.next()
        if before is not None and (suspect is not None or (self._draws and not before.drawn)):
            return False
        if suspect is None:
            self.speculation.draft(self.scheduler.running)
            under_way = {sequence.request for step in self._under_way for sequence in step.parts}
            schedule = self.scheduler.schedule(1 if self._draws else self._depth, under_way)
        else:
            schedule = self.scheduler.schedule_alone(suspect)
        if not schedule.work:
            return False
        self.steps += 1
        self._in_step = [pool.held for pool in self.pages.pools]
        wanted = [self._wanted_rows(sequence, count) for sequence, count in schedule.work]
        draws = draws_for(schedule, wanted, self.growth.eos_ids) if self._draws else None
        batch = assemble(schedule, wanted, len(self.pages.pools), draws, None if before is None else before.last_rows())
        drawn = draws is not None and not np.isnan(draws.rows[:, 0]).any()
        parts = {}
        for (sequence, count), positions in zip(schedule.work, wanted, strict=True):
            drafted = max(count - sequence.pending, 0)
            sequence.computed += count - drafted
            parts[sequence] = Part(positions, drafted, sequence.computed, last=not sequence.pending)
            sequence.unread += drawn and parts[sequence].last
        output: Callable[[], StepOutput]
        try:
            output = self._asynchronous.begin(batch) if self._asynchronous else partial(self.runner.step, batch)
        except DistributedError:
            raise
        except Exception as error:  # it is told when the step's turn comes
            output, drawn = partial(_raise, error), False
        except BaseException:  # as in _end
            self.scheduler.undo([schedule, *self._abandon()])
            raise
        self._under_way.append(Step(schedule, parts, output, drawn))
        return True

    def _end(self, step: Step) -> list[tuple[Request, Completion]]:
        """What the oldest step under way brought."""
        try:
            output = step.output()
        except DistributedError:
            raise  # no request's fault, and there is nothing left to run on
        except Exception as error:  # of any kind: a backend's errors are its own, and one request must not end all
            self._confine(step, error)
            return []
        except BaseException:  # Ctrl-C: whoever is asked to go on after it must find whole pages
            self.scheduler.undo([step.schedule, *self._abandon()])
            raise
        news: list[tuple[Request, Completion]] = []
        ready: dict[Request, list[tuple[Sequence, list[Row]]]] = {}
        row = 0
        for sequence, part in step.parts.items():
            begin, row = row, row + len(part.wanted)
            if sequence not in sequence.request.sequences:  # it has ended while this was under way
                continue
            sequence.unread -= step.drawn and part.last
            try:
                self._read_prompt_rows(sequence, part.wanted, output.logits, begin)
            except Exception as error:  # its own rows are bad: no concern of the others
                self._fail(sequence.request, error)
            self.prefixes.publish(sequence, part.end)
            if part.last and not sequence.request.finished:
                own = [Row(output, i) for i in range(row - 1 - part.drafted, row)]
                ready.setdefault(sequence.request, []).append((sequence, own))
        for request, last_rows in ready.items():
            try:
                news += [(request, piece) for piece in self.growth.advance(request, last_rows)]
            except Exception as error:  # likewise
                self._fail(request, error)
        self.tokens_out += sum(len(piece.token_ids) for _, piece in news)
        return news

    def counters(self) -> Counters:
        waiting, running = self.scheduler.waiting, self.scheduler.running
        layout = self.pages.layout
        return Counters(
            waiting=len(waiting),
            running=len(running),
            sequences=sum(len(request.sequences) for request in running),
            pools=tuple(
                PoolCounters(window, total, len(pool.free), len(pool.cached), pool.evictions, in_step)
                for window, total, pool, in_step in zip(
                    layout.windows, layout.pages, self.pages.pools, self._in_step, strict=True
                )
            ),
            steps=self.steps,
            tokens_in=self.tokens_in,
            tokens_out=self.tokens_out,
            prefix_asked=self.prefixes.asked,
            prefix_found=self.prefixes.found,
            drafted=self.speculation.drafted,
            accepted=self.speculation.accepted,
            preemptions=self.scheduler.preemptions,
            failed=self.failed,
            failed_steps=self.failed_steps,
        )

    def _confine(self, step: Step, error: Exception) -> None:
        self.failed_steps += 1
        requests = {sequence.request for sequence in step.parts}
        if len(requests) == 1:
            self._fail(requests.pop(), error)
        else:
            self.suspects.accuse((sequence, part.end) for sequence, part in step.parts.items())
        self.scheduler.undo([step.schedule, *self._abandon()])

    def _abandon(self) -> list[Schedule]:
        """Gives up the steps under way: those behind one that broke off go on from what it did not do."""
        schedules = [step.schedule for step in self._under_way]
        self._under_way.clear()
        return schedules

    def _fail(self, request: Request, error: Exception) -> None:
        if request.finished:  # it has failed by another of its sequences
            return
        self.failed += 1
        request.error = as_ours(error)
        for sequence in request.sequences:
            if sequence.table is not None:
                self.pages.withdraw(sequence.table)  # nobody builds on what it computed
        self.abort(request)

    def _adapter(self, name: str | None) -> int:
        if name is None:
            return -1
        if name not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise RequestError(f"adapter {name!r}: no such adapter is loaded; there are {known}", param="adapter")
        return self.adapters.index(name)

    def _wanted_rows(self, sequence: Sequence, count: int) -> range:
        """Positions, out of those computed now, whose logits are wanted."""
        end = sequence.computed + count
        return range(max(sequence.computed, min(sequence.first_wanted, end)), end)

    def _read_prompt_rows(self, sequence: Sequence, positions: range, logits: Rows, begin: int) -> None:
        """Keeps what was asked of the prompt's own rows: row p says how likely the token at p + 1 was. begin: where
        they stand in the step's logits."""
        request = sequence.request
        if request.logits is not None:
            request.logits.extend(logits[begin : begin + len(positions)].copy())
        if request.params.prompt_logprobs is None or request.forked:
            return
        for i, position in enumerate(positions, begin):
            if position + 1 < len(request.prompt) and position + 1 == len(request.prompt_logprobs):
                token, count = request.prompt[position + 1], request.params.prompt_logprobs
                logprob, top = token_logprob(logits[i], token, count)
                request.prompt_logprobs.append(logprob)
                request.prompt_top_logprobs.append(top)


def _raise(error: Exception) -> NoReturn:
    raise error
