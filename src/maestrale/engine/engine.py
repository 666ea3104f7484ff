"""Continuous batching: requests go in, tokens come out, one step at a time; no thread, no clock, no torch."""

from __future__ import annotations

import secrets
from collections.abc import Sequence as Items

import numpy as np
from numpy.typing import NDArray

from maestrale.batch import Runner
from maestrale.engine.assemble import assemble
from maestrale.engine.checks import check_prompt, check_width
from maestrale.engine.confine import Suspects, as_ours
from maestrale.engine.counters import Counters, PoolCounters
from maestrale.engine.growth import Growth
from maestrale.engine.pages import Pages
from maestrale.engine.prefix import PrefixCache
from maestrale.engine.request import Completion, Request, Row, Sequence
from maestrale.engine.scheduler import Schedule, Scheduler
from maestrale.engine.speculation import Speculation
from maestrale.errors import RequestError
from maestrale.sampling.params import SamplingParams
from maestrale.sampling.policy import token_logprob
from maestrale.text.tokenizer import Tokenizer


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
        self.speculation = Speculation(runner.layout.max_chunk, speculate)
        self.growth = Growth(self.scheduler, self.speculation, vocab_size, tokenizer)
        self.suspects = Suspects()
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
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            length_limit=min(len(prompt) + params.max_tokens, layout.max_len),
            chunk=min(chunk_size or layout.max_chunk, layout.max_chunk),
            keep_logits=keep_logits,
            reply=reply,
            namespace=f"{adapter}/{namespace}",
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
        """
        if (suspect := self.suspects.next()) is None:
            self.speculation.draft(self.scheduler.running)
            schedule = self.scheduler.schedule()
        else:
            schedule = self.scheduler.schedule_alone(suspect)
        if not schedule.work:
            return []
        self.steps += 1
        wanted = [self._wanted_rows(sequence, count) for sequence, count in schedule.work]
        try:
            output = self.runner.step(assemble(schedule, wanted, len(self.pages.pools)))
        except Exception as error:
            self._confine(schedule, error)
            return []
        except BaseException:  # Ctrl-C: whoever is asked to go on after it must find whole pages
            self.scheduler.undo(schedule)
            raise
        news: list[tuple[Request, Completion]] = []
        ready: dict[Request, list[tuple[Sequence, list[Row]]]] = {}
        row = 0
        for (sequence, count), positions in zip(schedule.work, wanted, strict=True):
            rows, row = output.logits[row : row + len(positions)], row + len(positions)
            try:
                self._read_prompt_rows(sequence, positions, rows)
            except Exception as error:
                self._fail(sequence.request, error)
            drafted = max(count - sequence.pending, 0)
            sequence.computed += count - drafted
            self.prefixes.publish(sequence)
            if not sequence.pending and not sequence.request.finished:
                last = range(row - 1 - drafted, row)
                experts = [None if output.experts is None else output.experts[i] for i in last]
                own = [Row(output.logits[i], chosen) for i, chosen in zip(last, experts, strict=True)]
                ready.setdefault(sequence.request, []).append((sequence, own))
        for request, last_rows in ready.items():
            try:
                news += [(request, piece) for piece in self.growth.advance(request, last_rows)]
            except Exception as error:
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
                PoolCounters(window, total, len(pool.free), len(pool.cached), pool.evictions)
                for window, total, pool in zip(layout.windows, layout.pages, self.pages.pools, strict=True)
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

    def _confine(self, schedule: Schedule, error: Exception) -> None:
        self.failed_steps += 1
        requests = {sequence.request for sequence, _ in schedule.work}
        if len(requests) == 1:
            self._fail(requests.pop(), error)
        else:
            self.suspects.accuse(schedule)
            self.scheduler.undo(schedule)

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

    def _read_prompt_rows(self, sequence: Sequence, positions: range, rows: NDArray[np.float32]) -> None:
        """Keeps what was asked of the prompt's own rows: row p says how likely the token at p + 1 was."""
        request = sequence.request
        if request.logits is not None:
            request.logits.extend(rows.copy())
        if request.params.prompt_logprobs is None or request.forked:
            return
        for position, row in zip(positions, rows, strict=True):
            if position + 1 < len(request.prompt) and position + 1 == len(request.prompt_logprobs):
                logprob, top = token_logprob(row, request.prompt[position + 1], request.params.prompt_logprobs)
                request.prompt_logprobs.append(logprob)
                request.prompt_top_logprobs.append(top)
