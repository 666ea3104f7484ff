"""Continuous batching: requests go in, tokens come out, one step at a time; no thread, no clock, no torch."""

from __future__ import annotations

import secrets
from collections.abc import Sequence as Items

import numpy as np
from numpy.typing import NDArray

from maestrale.batch import Runner
from maestrale.engine.assemble import assemble
from maestrale.engine.confine import Suspects, as_ours
from maestrale.engine.pages import Pages
from maestrale.engine.prefix import PrefixCache
from maestrale.engine.request import Completion, Request, Row, Sequence
from maestrale.engine.scheduler import Schedule, Scheduler
from maestrale.errors import RequestError
from maestrale.sampling.beam import BeamSearch
from maestrale.sampling.constraint import Constraint
from maestrale.sampling.params import SamplingParams
from maestrale.sampling.policy import history_for, log_softmax, sample, token_logprob
from maestrale.sampling.stop import StopStrings
from maestrale.text.tokenizer import Tokenizer


class Engine:
    """Drives one runner. `submit` queues a request, `step` does one batch and gives what is new in it.

    prefix_cache: whether a prompt may begin on the pages of an earlier one that began alike. adapters: the names of the
    runner's, in its order.
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
    ):
        self.runner, self.vocab_size, self.tokenizer, self.adapters = runner, vocab_size, tokenizer, tuple(adapters)
        self.eos_ids = () if tokenizer is None else (tokenizer.eos_id,)
        self.pages = Pages(runner.layout)
        self.prefixes = PrefixCache(self.pages, prefix_cache)
        self.scheduler = Scheduler(self.pages, self.prefixes, runner.layout.max_chunk, max_sequences)
        self.suspects = Suspects()

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
        self._check_prompt(prompt, params)
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
        self._check_width(request)
        self._prepare(request.sequences[0])
        self.scheduler.add(request)
        return request

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running)

    def abort(self, request: Request) -> None:
        """Ends a request; its pages are free at once. Harmless where it has ended already."""
        if not request.finished:
            self.scheduler.remove(request)
            request.sequences = []

    def step(self) -> list[tuple[Request, Completion]]:
        """One batch. Gives, for each sequence that went on, what was added to it, as a Completion.

        A request that failed has its `error` set and no pages any more; the others are not touched. When a step
        fails, the next ones compute its requests one by one, and only who fails alone is at fault.
        """
        suspect = self.suspects.next()
        schedule = self.scheduler.schedule() if suspect is None else self.scheduler.schedule_alone(suspect)
        if not schedule.work:
            return []
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
        ready: dict[Request, list[tuple[Sequence, Row]]] = {}
        row = 0
        for (sequence, count), positions in zip(schedule.work, wanted, strict=True):
            rows, row = output.logits[row : row + len(positions)], row + len(positions)
            try:
                self._read_prompt_rows(sequence, positions, rows)
            except Exception as error:
                self._fail(sequence.request, error)
            sequence.computed += count
            self.prefixes.publish(sequence)
            if not sequence.pending and not sequence.request.finished:
                experts = None if output.experts is None else output.experts[row - 1]
                ready.setdefault(sequence.request, []).append((sequence, Row(rows[-1], experts)))
        for request, last_rows in ready.items():
            try:
                news += [(request, piece) for piece in self._advance(request, last_rows)]
            except Exception as error:
                self._fail(request, error)
        return news

    def _confine(self, schedule: Schedule, error: Exception) -> None:
        requests = {sequence.request for sequence, _ in schedule.work}
        if len(requests) == 1:
            self._fail(requests.pop(), error)
        else:
            self.suspects.accuse(schedule)
            self.scheduler.undo(schedule)

    def _fail(self, request: Request, error: Exception) -> None:
        if request.finished:  # it has failed by another of its sequences
            return
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

    def _check_prompt(self, prompt: Items[int], params: SamplingParams) -> None:
        if len(prompt) == 0:
            raise RequestError("the prompt has no tokens: at least one is needed", param="prompt")
        whole = all(isinstance(token, (int, np.integer)) and type(token) is not bool for token in prompt)
        if not whole or min(prompt) < 0 or max(prompt) >= self.vocab_size:
            raise RequestError(
                f"the prompt's token ids must be whole numbers from 0 to {self.vocab_size - 1}", param="prompt"
            )
        params.check_vocabulary(self.vocab_size)
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and this model's folder has none", param="stop")
        if params.constraint and self.tokenizer is None:
            raise RequestError("a constraint needs a tokenizer, and this model's folder has none", param="constraint")
        limit = self.runner.layout.max_len
        if len(prompt) + min(params.max_tokens, 1) > limit:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens and the context holds {limit}, completion included: "
                "shorten the prompt or raise max_len",
                param="prompt",
            )

    def _check_width(self, request: Request) -> None:
        """A request alone must fit even when its sequences share nothing: then the oldest one can always go on."""
        layout = self.pages.layout
        for ring, pages in zip(layout.rings, layout.pages, strict=True):
            if (need := request.width * min(-(-request.length_limit // layout.page_size), ring)) > pages:
                raise RequestError(
                    f"{request.width} sequences of {request.length_limit} tokens may take {need} pages of the cache, "
                    f"which has {pages}: lower n, beam_width or max_tokens",
                    param="beam_width" if request.params.beam_width > 1 else "n",
                )
        if request.width > layout.max_chunk:
            raise RequestError(f"{request.width} sequences do not fit a step of {layout.max_chunk} tokens", "n")
        if request.params.beam_width > 1 and request.params.logprobs is not None:
            raise RequestError("logprobs are not kept for beams: a beam has a score", param="logprobs")
        if request.params.beam_width > 1 and request.params.experts:
            raise RequestError("experts are not kept for beams", param="experts")

    def _prepare(self, sequence: Sequence) -> None:
        request = sequence.request
        if self.tokenizer is not None and request.params.beam_width == 1:
            sequence.decoder = self.tokenizer.stream(after=request.text_before)
            if isinstance(request.params.constraint, Constraint):
                sequence.matcher = self.tokenizer.grammars.matcher(
                    request.params.constraint, sequence.decoder.drops_space
                )
        sequence.history = history_for(request.params, request.prompt, self.vocab_size)
        if request.params.logprobs is not None:
            sequence.completion.logprobs = []
            sequence.completion.top_logprobs = []

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

    def _advance(self, request: Request, rows: list[tuple[Sequence, Row]]) -> list[Completion]:
        """Turns the rows of sequences that have caught up into their next tokens."""
        if request.params.beam_width > 1 and request.params.max_tokens > 0:
            return self._advance_beams(request, rows)
        if not request.forked:
            request.forked = True
            leader, row = rows[0]
            rows = [(leader, row)] + [(self._fork(leader, i), row) for i in range(1, request.params.n)]
        if request.params.max_tokens == 0:
            return [self._finish(sequence, "length", Completion(index=sequence.index)) for sequence, _ in rows]
        return [self._append(sequence, row) for sequence, row in rows]

    def _append(self, sequence: Sequence, row: Row) -> Completion:
        request, params = sequence.request, sequence.request.params
        eos_ids = () if params.ignore_eos else self.eos_ids
        matcher, piece = sequence.matcher, Completion(index=sequence.index)
        if matcher is not None and matcher.finished:  # only the empty text will do
            return self._finish(sequence, "stop", piece)
        allowed = None if matcher is None else matcher.allowed
        token = sample(
            row.logits, params, request.seed, sequence.index, sequence.generated, eos_ids, sequence.history, allowed
        )
        if token in eos_ids:
            return self._finish(sequence, "stop", piece)
        if matcher is not None:
            matcher.consume(token)
        sequence.tokens.append(token)
        if sequence.history is not None:
            sequence.history.append(token)
        piece.token_ids.append(token)
        if params.logprobs is not None:
            logprob, top = token_logprob(row.logits, token, params.logprobs)
            piece.logprobs, piece.top_logprobs = [logprob], [top]
        if params.experts and row.experts is not None:
            piece.experts = [row.experts.tolist()]
        if sequence.decoder is not None:
            piece.text = sequence.decoder.push(token)
            if matcher is not None and matcher.calls_begun:  # nothing stops inside a call
                piece.text = sequence.stops.finish() + piece.text
            elif sequence.generated >= params.min_tokens:  # before, a stop string is text like any other
                piece.text, stopped = sequence.stops.push(piece.text)
                if stopped:
                    return self._finish(sequence, "stop", piece)
        if matcher is not None and matcher.finished:
            return self._finish(sequence, "stop", piece)
        if len(sequence.tokens) >= request.length_limit:
            return self._finish(sequence, "length", piece)
        _add(sequence.completion, piece)
        return piece

    def _finish(self, sequence: Sequence, reason: str, piece: Completion) -> Completion:
        """Ends one sequence; when it was the last, its request leaves the scheduler."""
        request = sequence.request
        if sequence.decoder is not None:
            rest, stopped = sequence.stops.push(sequence.decoder.finish())
            piece.text += rest if stopped else rest + sequence.stops.finish()
        piece.finish_reason = reason
        _add(sequence.completion, piece)
        sequence.completion.finish_reason = reason
        self._conclude(request, sequence.completion)
        piece.prompt_logprobs = sequence.completion.prompt_logprobs
        piece.prompt_top_logprobs = sequence.completion.prompt_top_logprobs
        self._drop(sequence)
        return piece

    def _conclude(self, request: Request, completion: Completion) -> None:
        if request.params.prompt_logprobs is not None:
            completion.prompt_logprobs = request.prompt_logprobs
            completion.prompt_top_logprobs = request.prompt_top_logprobs
        request.completions.append(completion)

    def _drop(self, sequence: Sequence) -> None:
        """One sequence of a request ends; with the last one the request does."""
        request = sequence.request
        if len(request.sequences) == 1:
            self.abort(request)
            return
        if sequence.table is not None:
            self.pages.release(sequence.table)
        request.sequences.remove(sequence)

    def _fork(self, sequence: Sequence, index: int) -> Sequence:
        """A sequence with the same past, on the same pages."""
        twin = Sequence(sequence.request, index, sequence.tokens)
        twin.computed, twin.keys = sequence.computed, list(sequence.keys)
        if sequence.table is not None:
            twin.table = self.pages.fork(sequence.table)
        self._prepare(twin)
        sequence.request.sequences.append(twin)
        return twin

    def _advance_beams(self, request: Request, rows: list[tuple[Sequence, Row]]) -> list[Completion]:
        params = request.params
        if request.beam is None:
            request.forked = True
            request.beam = BeamSearch(
                params.beam_width,
                request.length_limit - len(request.prompt),
                () if params.ignore_eos else self.eos_ids,
                params.length_penalty,
                params.min_tokens,
            )
        continued = request.beam.advance(log_softmax(np.stack([row.logits for _, row in rows])))
        if request.beam.done:
            return self._finish_beams(request, request.beam)
        parents = [sequence for sequence, _ in rows]
        kept: set[int] = set()
        children = []
        for parent, token in continued:
            # The first child of a beam is the beam itself, gone on; any other shares its pages.
            children.append((self._fork(parents[parent], 0) if parent in kept else parents[parent], token))
            kept.add(parent)
        for sequence, token in children:
            sequence.tokens.append(token)
        for i, sequence in enumerate(parents):
            if i not in kept:
                self._drop(sequence)
        request.sequences = [sequence for sequence, _ in children]
        return []

    def _finish_beams(self, request: Request, beam: BeamSearch) -> list[Completion]:
        for index, found in enumerate(beam.results()[: request.params.n]):
            reason = "stop" if found.finished else "length"
            completion = Completion("", list(found.token_ids), finish_reason=reason, index=index, score=found.score)
            if self.tokenizer is not None:
                stops = StopStrings(request.params.stop)
                text, stopped = stops.push(self.tokenizer.decode_continuation(request.text_before, found.token_ids))
                completion.text = text if stopped else text + stops.finish()
                completion.finish_reason = "stop" if stopped else reason
            self._conclude(request, completion)
        self.abort(request)
        return list(request.completions)


def _add(whole: Completion, piece: Completion) -> None:
    whole.text += piece.text
    whole.token_ids += piece.token_ids
    if whole.logprobs is not None and whole.top_logprobs is not None:
        whole.logprobs += piece.logprobs or []
        whole.top_logprobs += piece.top_logprobs or []
    if piece.experts is not None:
        whole.experts = (whole.experts or []) + piece.experts
