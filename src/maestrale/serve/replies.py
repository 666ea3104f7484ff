"""An assistant's reply, whole or as it comes: what chats and fill-in-the-middle share."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import Any

from starlette.responses import JSONResponse, Response

from maestrale.errors import RequestError
from maestrale.llm import Completion
from maestrale.serve import view
from maestrale.serve.answers import PING, EventStream, event, ignored_header
from maestrale.serve.context import Context
from maestrale.serve.job import Job, Work
from maestrale.serve.logprobs import chat_logprobs
from maestrale.serve.problems import bad_request
from maestrale.serve.protocol import Sampling
from maestrale.serve.tools import Answers, call_delta, call_json
from maestrale.serve.usage import usage


async def answer(context: Context, body: Sampling, work: Work, param: str, calls: bool = False) -> Response:
    """The reply to one prompt. param: the field that the prompt was made of, to be named where it is refused.
    calls: whether there may be calls of tools in it."""
    context.require_room(work.ids, work.params, param)
    head = {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": context.require_model(body.model),
    }
    answers = Answers(context.llm.tokenizer, str(head["id"]), calls)
    async with AsyncExitStack() as stack:
        try:
            job = await stack.enter_async_context(context.service.job([work], streaming=bool(body.stream)))
        except RequestError as error:
            raise bad_request(str(error), param if error.param == "prompt" else error.param) from None
        if body.stream:
            chunks = _chunks(context, body, job, answers, head | {"object": "chat.completion.chunk"}, stack.pop_all())
            return EventStream(chunks, ignored_header(body))
        (completions,) = await job.completions()
        choices = await context.in_worker(lambda: [_choice(context, body, answers, each) for each in completions])
        whole = head | {
            "object": "chat.completion",
            "choices": choices,
            "usage": (used := usage(job, completions)),
        }
        whole |= view.cache(context, body, used["total_tokens"])
        return JSONResponse(whole, headers=ignored_header(body))
    raise AssertionError("an exit stack swallows nothing")


def _choice(context: Context, body: Sampling, answers: Answers, completion: Completion) -> dict[str, Any]:
    text, calls, reason = answers.split(completion)
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if calls:
        message |= {"content": text or None, "tool_calls": [call_json(call) for call in calls]}
    return {
        "index": completion.index,
        "message": message,
        "logprobs": chat_logprobs(context.llm.tokenizer, completion),
        "finish_reason": reason,
    } | view.experts(body, completion)


async def _chunks(
    context: Context,
    body: Sampling,
    job: Job,
    answers: Answers,
    head: dict[str, Any],
    held: AsyncExitStack,
) -> AsyncGenerator[bytes, None]:
    """The events of a streamed reply; `held` lets the job go, however it ends."""
    extra: dict[str, Any] = {"usage": None} if body.with_usage else {}

    def chunk(
        index: int, delta: dict[str, Any], logprobs: Any = None, finish_reason: str | None = None, **more: Any
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason} | more
        return event(head | {"choices": [choice]} | extra | view.cache(context, body, len(job.work[0].ids) + tokens))

    tokens = 0  # generated, over all n
    async with held:
        yield b"".join(chunk(i, {"role": "assistant", "content": ""}) for i in range(job.work[0].params.n))
        async for pieces in job.pieces(context.settings.ping):
            written = []
            for completion in (piece.completion for piece in pieces):
                tokens += len(completion.token_ids)
                logprobs = chat_logprobs(context.llm.tokenizer, completion)
                text, calls, reason = answers.split(completion)
                delta: dict[str, Any] = {"tool_calls": [call_delta(call) for call in calls]} if calls else {}
                if text or (not calls and logprobs and logprobs["content"]):
                    delta["content"] = text
                if delta:
                    written.append(chunk(completion.index, delta, logprobs, **view.experts(body, completion)))
                if reason is not None:
                    written.append(chunk(completion.index, {}, None, reason))
            if written or not pieces:
                yield b"".join(written) or PING
        if body.with_usage:
            yield event(head | {"choices": [], "usage": usage(job, tokens)})
