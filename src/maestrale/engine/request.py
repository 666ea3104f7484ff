"""What is asked of the engine, what it knows of it while it runs, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from maestrale.batch import StepOutput
from maestrale.engine.lookup import LookUp
from maestrale.engine.pages import PageTable
from maestrale.errors import MaestraleError
from maestrale.sampling.beam import BeamSearch
from maestrale.sampling.grammar import Matcher
from maestrale.sampling.params import SamplingParams
from maestrale.sampling.policy import History
from maestrale.sampling.stop import StopStrings
from maestrale.text.stream import StreamDecoder
from maestrale.text.tools import ToolCall

TopLogprobs = list[tuple[int, float]]


@dataclass
class Completion:
    """One continuation of a prompt, or, from a stream, the next piece of one.

    text: without the stop string that ended it. token_ids: without the end-of-sequence token that ended it.
    logprobs: natural log, of the raw logits, one for each token; None unless asked for.
    top_logprobs: for each token the likeliest (id, logprob), as many as were asked for.
    prompt_logprobs, prompt_top_logprobs: likewise for the prompt's tokens; the first has None.
    finish_reason: "stop" (end of sequence, stop string, or a constraint met), "length", "tool_calls" (an answer in a
    chat that ends with them), or None while it goes on.
    experts: for each token, for each layer, the experts whose work gave it (those of the row of logits it was drawn
        from), the router's first choice first; None unless asked for, and the model is a mixture.
    index: which of the n continuations. score: a beam's, sum of logprobs / length ** length_penalty.
    tool_calls: of an answer in a chat with tools; they are not part of its text.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] | None = None
    prompt_logprobs: list[float | None] | None = None
    finish_reason: str | None = None
    index: int = 0
    top_logprobs: list[TopLogprobs] | None = None
    prompt_top_logprobs: list[TopLogprobs | None] | None = None
    score: float | None = None
    tool_calls: list[ToolCall] | None = None
    experts: list[list[list[int]]] | None = None

    def add(self, piece: Completion) -> None:
        """Goes on by what a later step has added."""
        self.text += piece.text
        self.token_ids += piece.token_ids
        if self.logprobs is not None and self.top_logprobs is not None:
            self.logprobs += piece.logprobs or []
            self.top_logprobs += piece.top_logprobs or []
        if piece.experts is not None:
            self.experts = [] if self.experts is None else self.experts
            self.experts += piece.experts
        self.finish_reason = piece.finish_reason


class Row(NamedTuple):
    """What a step says of one position: row `at` of its output. logits: float32 [vocab]. experts: int16 [layers, K],
    where asked for. token: what the runner has drawn, -1 where that is left to us."""

    output: StepOutput
    at: int

    @property
    def logits(self) -> NDArray[np.float32]:
        return self.output.logits[self.at]

    @property
    def experts(self) -> NDArray[np.int16] | None:
        return None if self.output.experts is None else self.output.experts[self.at]

    @property
    def token(self) -> int:
        return -1 if self.output.tokens is None else int(self.output.tokens[self.at])


class Sequence:
    """One row of tokens that grows: a prompt and one continuation of it.

    tokens: all known ids. computed: how many of them stand in the cache. A sequence has nothing else to do than to
    let `computed` catch up with the known ones; when it has, the last row of logits gives the next token.
    unread: how many further ones steps under way draw on the device (`Batch.follows`).
    keys: what its pages, so far as they were asked for, are found by (prefix.py). draft: tokens that may come next
    (speculation.py), which only the next step knows of.
    """

    def __init__(self, request: Request, index: int, tokens: Items[int]):
        self.request, self.index = request, index
        self.tokens = list(tokens)
        self.computed = self.unread = 0
        self.keys: list[bytes] = []
        self.draft: list[int] = []
        self.lookup: LookUp | None = None
        self.table: PageTable | None = None
        self.completion = Completion(index=index)
        self.decoder: StreamDecoder | None = None
        self.stops = StopStrings(request.params.stop)
        self.history: History | None = None
        self.matcher: Matcher | None = None

    @property
    def length(self) -> int:
        """Tokens that it will have when the steps under way are over, if it goes on."""
        return len(self.tokens) + self.unread

    @property
    def pending(self) -> int:
        return self.length - self.computed

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def first_wanted(self) -> int:
        """The first position whose row of logits is still wanted; the last token's gives the next one."""
        request = self.request
        if request.logits is not None:
            return len(request.logits)
        if request.params.prompt_logprobs is not None and not request.forked:
            return len(request.prompt_logprobs) - 1
        return self.length - 1


class Request:
    """A prompt with its parameters, and the sequences that continue it.

    It begins as one sequence. When the prompt is computed it becomes n of them (or a beam's width) on the same pages.
    text_before: the ids whose text a completion goes on from. seed: the one sampling uses.
    length_limit: known tokens at which a sequence ends. chunk: most tokens a step. namespace: cached pages are shared
    only with requests of the same one. adapter: its number, -1 for none. cached: how many of the prompt's tokens were
    found in the cache, what others had computed; preempted: what is found from now on may be its own.
    """

    def __init__(
        self,
        prompt: Items[int],
        params: SamplingParams,
        *,
        seed: int,
        length_limit: int,
        chunk: int,
        keep_logits: bool = False,
        reply: bool = False,
        namespace: str = "",
        adapter: int = -1,
    ):
        self.prompt, self.params, self.adapter = list(prompt), params, adapter
        self.text_before: list[int] = [] if reply else self.prompt
        self.seed, self.length_limit, self.chunk = seed, length_limit, chunk
        self.namespace = namespace
        self.width = max(params.n, params.beam_width)
        self.sequences = [Sequence(self, 0, prompt)]
        self.forked = self.preempted = False
        self.cached = 0
        self.beam: BeamSearch | None = None
        self.prompt_logprobs: list[float | None] = [None]
        self.prompt_top_logprobs: list[TopLogprobs | None] = [None]
        self.logits: list[NDArray[np.float32]] | None = [] if keep_logits else None
        self.error: MaestraleError | None = None
        self.completions: list[Completion] = []

    @property
    def finished(self) -> bool:
        return not self.sequences

    @property
    def done(self) -> int:
        """Tokens of its longest sequence that are computed; when it has finished, all that it could have had."""
        return max((sequence.computed for sequence in self.sequences), default=self.length_limit)

    def forget_drafts(self) -> bool:
        """Whether there were any."""
        drafted = [sequence for sequence in self.sequences if sequence.draft]
        for sequence in drafted:
            sequence.draft = []
        return bool(drafted)

    def takes(self, budget: int) -> list[tuple[Sequence, int]]:
        """Which of its sequences would compute how many tokens if `budget` tokens were left in this step."""
        pending = [sequence.pending for sequence in self.sequences]
        # Beams are ranked against each other, so their last rows must come out of one and the same step.
        together = self.params.beam_width > 1 and self.forked
        held_back = 1 if together and (sum(pending) > budget or max(pending) > self.chunk) else 0
        taken = []
        for sequence in self.sequences:
            if sequence.unread and sequence.length >= self.length_limit:
                continue  # it ends with the token that is being drawn
            count = min(sequence.pending + len(sequence.draft) - held_back, budget, self.chunk)
            if count > 0:
                taken.append((sequence, count))
                budget -= count
        return taken
