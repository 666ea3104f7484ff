"""From rows of logits to tokens, text and ends: how sequences grow, part into several, and finish."""

from __future__ import annotations

import numpy as np

from maestrale.engine.request import Completion, Request, Row, Sequence
from maestrale.engine.scheduler import Scheduler
from maestrale.engine.speculation import Speculation
from maestrale.sampling.beam import BeamSearch
from maestrale.sampling.constraint import Constraint
from maestrale.sampling.policy import history_for, log_softmax, sample, token_logprob
from maestrale.sampling.stop import StopStrings
from maestrale.text.tokenizer import Tokenizer


class Growth:
    """scheduler: there requests end. speculation: it learns what its drafts were worth. eos_ids: tokens that end."""

    def __init__(self, scheduler: Scheduler, speculation: Speculation, vocab_size: int, tokenizer: Tokenizer | None):
        self._scheduler, self._pages, self._speculation = scheduler, scheduler.pages, speculation
        self._vocab_size, self._tokenizer = vocab_size, tokenizer
        self.eos_ids = () if tokenizer is None else (tokenizer.eos_id,)

    def prepare(self, sequence: Sequence, twin: Sequence | None = None) -> None:
        """twin: one with the same past, whose decoder has read the prompt and nothing else."""
        request = sequence.request
        if self._tokenizer is not None and request.params.beam_width == 1:
            if twin is not None and twin.decoder is not None:
                sequence.decoder = twin.decoder.copy()
            else:
                sequence.decoder = self._tokenizer.stream(after=request.text_before)
            if isinstance(request.params.constraint, Constraint):
                sequence.matcher = self._tokenizer.grammars.matcher(
                    request.params.constraint, sequence.decoder.drops_space
                )
        sequence.history = history_for(request.params, request.prompt, self._vocab_size)
        if request.params.logprobs is not None:
            sequence.completion.logprobs = []
            sequence.completion.top_logprobs = []

    def advance(self, request: Request, rows: list[tuple[Sequence, list[Row]]]) -> list[Completion]:
        """Turns the rows of sequences that have caught up into their next tokens. Each sequence has one row, or one
        more for each token of its draft that was computed."""
        if request.params.beam_width > 1 and request.params.max_tokens > 0:
            return self._advance_beams(request, rows)
        if not request.forked:
            request.forked = True
            leader, row = rows[0]
            rows = [(leader, row)] + [(self._fork(leader, i), row) for i in range(1, request.params.n)]
        if request.params.max_tokens == 0:
            return [self._finish(sequence, "length", Completion(index=sequence.index)) for sequence, _ in rows]
        return [piece for sequence, own in rows for piece in self._extend(sequence, own)]

    def _extend(self, sequence: Sequence, rows: list[Row]) -> list[Completion]:
        """Appends a token for the first row, and for each further one while the draft has foretold the token before."""
        draft, sequence.draft = sequence.draft[: len(rows) - 1], []
        pieces = [self._append(sequence, rows[0])]
        for guess, row in zip(draft, rows[1:], strict=True):
            if pieces[-1].finish_reason is not None or sequence.tokens[-1] != guess:
                break
            sequence.computed += 1
            pieces.append(self._append(sequence, row))
        if draft and sequence.lookup is not None:
            self._speculation.learn(sequence.lookup, len(draft), len(pieces) - 1)
        return pieces

    def _append(self, sequence: Sequence, row: Row) -> Completion:
        request, params = sequence.request, sequence.request.params
        eos_ids = () if params.ignore_eos else self.eos_ids
        matcher, piece = sequence.matcher, Completion(index=sequence.index)
        if matcher is not None and matcher.finished:  # only the empty text will do
            return self._finish(sequence, "stop", piece)
        token = row.token
        if token < 0:
            token = sample(
                row.logits, params, request.seed, sequence.index, sequence.generated, eos_ids, sequence.history, matcher
            )
        if token in eos_ids:
            return self._finish(sequence, "stop", piece)
        if matcher is not None:
            matcher.consume(token, ahead=params.temperature > 0)
        sequence.tokens.append(token)
        if sequence.history is not None:
            sequence.history.append(token)
        piece.token_ids.append(token)
        if params.logprobs is not None:
            logprob, top = token_logprob(row.logits, token, params.logprobs)
            piece.logprobs, piece.top_logprobs = [logprob], [top]
        if params.experts and (experts := row.experts) is not None:
            piece.experts = [experts.tolist()]
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
        sequence.completion.add(piece)
        return piece

    def _finish(self, sequence: Sequence, reason: str, piece: Completion) -> Completion:
        """Ends one sequence; when it was the last, its request leaves the scheduler."""
        request = sequence.request
        if sequence.decoder is not None:
            rest, stopped = sequence.stops.push(sequence.decoder.finish())
            piece.text += rest if stopped else rest + sequence.stops.finish()
        piece.finish_reason = reason
        sequence.completion.add(piece)
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
            self._scheduler.end(request)
            return
        if sequence.table is not None:
            self._pages.release(sequence.table)
        request.sequences.remove(sequence)

    def _fork(self, sequence: Sequence, index: int) -> Sequence:
        """A sequence with the same past, on the same pages."""
        twin = Sequence(sequence.request, index, sequence.tokens)
        twin.computed, twin.keys = sequence.computed, list(sequence.keys)
        if sequence.table is not None:
            twin.table = self._pages.fork(sequence.table)
        self.prepare(twin, sequence)
        sequence.request.sequences.append(twin)
        return twin

    def _advance_beams(self, request: Request, rows: list[tuple[Sequence, list[Row]]]) -> list[Completion]:
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
        continued = request.beam.advance(log_softmax(np.stack([own[-1].logits for _, own in rows])))
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
            if self._tokenizer is not None:
                stops = StopStrings(request.params.stop)
                text, stopped = stops.push(self._tokenizer.decode_continuation(request.text_before, found.token_ids))
                completion.text = text if stopped else text + stops.finish()
                completion.finish_reason = "stop" if stopped else reason
            self._conclude(request, completion)
        self._scheduler.end(request)
        return list(request.completions)
