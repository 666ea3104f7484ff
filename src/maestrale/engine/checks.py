"""What cannot be served is refused when it is submitted: RequestError, with the name of the field."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from maestrale.batch import CacheLayout
from maestrale.engine.request import Request
from maestrale.errors import RequestError
from maestrale.sampling.params import SamplingParams
from maestrale.text.tokenizer import Tokenizer


def check_prompt(
    prompt: Sequence[int], params: SamplingParams, vocab_size: int, tokenizer: Tokenizer | None, limit: int
) -> None:
    """limit: tokens of the context."""
    if len(prompt) == 0:
        raise RequestError("the prompt has no tokens: at least one is needed", param="prompt")
    whole = all(isinstance(token, (int, np.integer)) and type(token) is not bool for token in prompt)
    if not whole or min(prompt) < 0 or max(prompt) >= vocab_size:
        raise RequestError(f"the prompt's token ids must be whole numbers from 0 to {vocab_size - 1}", param="prompt")
    params.check_vocabulary(vocab_size)
    if params.stop and tokenizer is None:
        raise RequestError("stop strings need a tokenizer, and this model's folder has none", param="stop")
    if params.constraint and tokenizer is None:
        raise RequestError("a constraint needs a tokenizer, and this model's folder has none", param="constraint")
    if len(prompt) + min(params.max_tokens, 1) > limit:
        raise RequestError(
            f"the prompt has {len(prompt)} tokens and the context holds {limit}, completion included: "
            "shorten the prompt or raise max_len",
            param="prompt",
        )


def check_width(request: Request, layout: CacheLayout) -> None:
    """A request alone must fit even when its sequences share nothing: then the oldest one can always go on."""
    for ring, pages in zip(layout.rings, layout.pages, strict=True):
        if (need := request.width * min(-(-request.length_limit // layout.page_size), ring)) > pages:
            raise RequestError(
                f"{request.width} sequences of {request.length_limit} tokens may take {need} pages of the cache, "
                f"which has {pages}: lower n, beam_width or max_tokens",
                param="beam_width" if request.params.beam_width > 1 else "n",
            )
    if request.width > layout.max_chunk:
        raise RequestError(f"{request.width} sequences do not fit a step of {layout.max_chunk} tokens", "n")
    if request.width > 1 and request.logits is not None:
        raise RequestError("rows of logits are kept of a single sequence: expected n and beam_width of 1", param="n")
    if request.params.beam_width > 1 and request.params.logprobs is not None:
        raise RequestError("logprobs are not kept for beams: a beam has a score", param="logprobs")
    if request.params.beam_width > 1 and request.params.experts:
        raise RequestError("experts are not kept for beams", param="experts")
