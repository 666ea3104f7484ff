"""/v1/completions: texts or token ids gone on with, one or many."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from maestrale.llm import Completion
from maestrale.serve import view
from maestrale.serve.answers import PING, EventStream, event, ignored_header, read_body, while_connected
from maestrale.serve.context import Context
from maestrale.serve.job import Job, Work
from maestrale.serve.logprobs import Columns
from maestrale.serve.protocol import CompletionRequest
from maestrale.serve.usage import usage


async def completions(context: Context, request: Request) -> Response:
    body = await read_body(request, CompletionRequest)
    return await while_connected(request.receive, _complete(context, body, request.scope["tenant"]))


async def _complete(context: Context, body: CompletionRequest, tenant: str) -> Response:
    model, params, prompts = context.require_model(body.model), body.completion_params(), body.prompts()
    encoded = await context.in_worker(lambda: [_ids(context, prompt) for prompt in prompts])
    for ids in encoded:
        context.require_room(ids, params, "prompt")
    head = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
    }
    async with AsyncExitStack() as stack:
        work = [Work(ids, params, False, context.models[model], tenant) for ids in encoded]
        job = await stack.enter_async_context(context.service.job(work, streaming=bool(body.stream)))
        choices = await context.in_worker(_Choices, context, body, prompts, encoded)
        if body.stream:
            return EventStream(_chunks(context, body, job, choices, head, stack.pop_all()), ignored_header(body))
        found = await job.completions()
        answer = head | {
            "choices": await context.in_worker(choices.of, list(enumerate(found))),
            "usage": (used := usage(job, [completion for group in found for completion in group])),
        }
        answer |= view.cache(context, body, used["total_tokens"])
        return JSONResponse(answer, headers=ignored_header(body))
    raise AssertionError("an exit stack swallows nothing")


def _ids(context: Context, prompt: str | list[int]) -> list[int]:
    return context.llm.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt


class _Choices:
    """Completions, or pieces of them, as choices: the first of each bears the prompt, where that is asked for."""

    def __init__(
        self, context: Context, body: CompletionRequest, prompts: list[str | list[int]], encoded: list[list[int]]
    ):
        self._tokenizer, self._prompts, self._encoded = context.llm.tokenizer, prompts, encoded
        self._body, self._n, self._echo, self._logprobs = body, body.n or 1, body.echo, body.logprobs is not None
        self._columns: dict[int, Columns] = {}
        self._begun: set[int] = set()

    def of(self, groups: list[tuple[int, list[Completion]]]) -> list[dict[str, Any]]:
        """groups: the number of a prompt, and completions of it."""
        return [self._choice(number, completion) for number, group in groups for completion in group]

    def _choice(self, number: int, completion: Completion) -> dict[str, Any]:
        index, text = number * self._n + completion.index, completion.text
        rows: dict[str, Any] | None = None
        opening = index not in self._begun
        self._begun.add(index)
        if opening and self._echo:
            prompt = self._prompts[number]
            text = (prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)) + text
        if self._logprobs:
            if opening:
                self._columns[index] = Columns(self._tokenizer, after=() if self._echo else self._encoded[number])
            ids, logprobs, tops = completion.token_ids, completion.logprobs or [], completion.top_logprobs or []
            columns = self._columns[index]
            if opening and self._echo:
                told, top = completion.prompt_logprobs or [], completion.prompt_top_logprobs or []
                rows = columns.rows([*self._encoded[number], *ids], [*told, *logprobs], [*top, *tops])
            else:
                rows = columns.rows(ids, logprobs, tops)
        choice = {"index": index, "text": text, "logprobs": rows, "finish_reason": completion.finish_reason}
        return choice | view.experts(self._body, completion)


async def _chunks(
    context: Context,
    body: CompletionRequest,
    job: Job,
    choices: _Choices,
    head: dict[str, Any],
    held: AsyncExitStack,
) -> AsyncGenerator[bytes, None]:
    """The events of streamed completions; `held` lets the job go, however it ends."""
    extra: dict[str, Any] = {"usage": None} if body.with_usage else {}
    tokens = 0
    async with held:
        async for pieces in job.pieces(context.settings.ping):
            tokens += sum(len(piece.completion.token_ids) for piece in pieces)
            made = choices.of([(piece.number, [piece.completion]) for piece in pieces])
            shown = [choice for choice in made if choice["text"] or choice["logprobs"] or choice["finish_reason"]]
            if shown or not pieces:
                more = extra | view.cache(context, body, sum(len(work.ids) for work in job.work) + tokens)
                yield b"".join(event(head | {"choices": [choice]} | more) for choice in shown) or PING
        if body.with_usage:
            yield event(head | {"choices": [], "usage": usage(job, tokens)})
