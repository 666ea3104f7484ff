"""The model view: what an answer tells of the inside of the model, where the field `model_view` asks for it."""

from __future__ import annotations

from typing import Any

from maestrale.llm import Completion
from maestrale.serve.context import Context
from maestrale.serve.protocol import Sampling


def experts(body: Sampling, completion: Completion) -> dict[str, Any]:
    """For a choice: `experts`, for each token, for each layer, the experts that gave it; null where there are none."""
    return {"experts": completion.experts} if body.model_view else {}


def cache(context: Context, body: Sampling, tokens: int) -> dict[str, Any]:
    """For an answer or an event: `cache`, the tokens of this sequence, the pages that all sequences held in the last
    step, and those that are kept for prompts which begin alike."""
    if not body.model_view:
        return {}
    kinds = [
        {"window": p.window, "held": p.in_step, "kept": p.cached, "pages": p.total}
        for p in context.llm.counters().pools
    ]
    return {"cache": {"tokens": tokens, "kinds": kinds}}


def card(context: Context) -> dict[str, Any]:
    """For a model's card: what the chat page must know of it. chats: whether it may have learnt to."""
    config = context.llm.config
    return {
        "maestrale": {
            "chats": context.llm.tokenizer.chats,
            "layers": config.n_layers,
            "experts": config.moe.num_experts if config.moe else None,
            "experts_per_token": config.moe.num_experts_per_tok if config.moe else None,
            "windows": list(config.sliding_window),
            "context": context.llm.max_len,
        }
    }
