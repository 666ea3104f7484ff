"""What every route needs: the model, its service, and a few workers for what would hold up the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from maestrale.llm import LLM
from maestrale.sampling.params import SamplingParams
from maestrale.serve.metrics import Metrics
from maestrale.serve.problems import ApiError, bad_request
from maestrale.serve.service import Service
from maestrale.serve.settings import Settings

P = ParamSpec("P")
T = TypeVar("T")


class Context:
    """One server's parts. created: when it began, in seconds since 1970, the date of its model's card."""

    def __init__(self, llm: LLM, service: Service, settings: Settings, metrics: Metrics):
        self.llm, self.service, self.settings, self.metrics = llm, service, settings, metrics
        self.created = int(time.time())
        self._workers = ThreadPoolExecutor(2, thread_name_prefix="text")

    async def in_worker(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """For long texts: tokenizing, formatting."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, lambda: function(*args, **kwargs))

    @property
    def models(self) -> dict[str, str | None]:
        """Every name that a request may ask for, with the adapter that it stands for: None is the model alone."""
        return {self.settings.name: None} | {name: name for name in self.settings.adapters}

    def require_model(self, name: str | None) -> str:
        """The name of what is asked for; None is the model alone. ApiError 404 for one that is not served."""
        if name is not None and name not in self.models:
            known = ", ".join(map(repr, self.models))
            raise ApiError(
                404, f"model {name[:100]!r} is not served here: expected {known}", "model", "model_not_found"
            )
        return name or self.settings.name

    def require_room(self, ids: Sequence[int], params: SamplingParams, param: str) -> None:
        """ApiError 400 where a prompt leaves the context no room for an answer; nothing is ever cut off."""
        if len(ids) + min(params.max_tokens, 1) > self.llm.max_len:
            raise bad_request(
                f"{param}: {len(ids)} tokens, and the context holds {self.llm.max_len}, answer included: shorten it",
                param,
                "context_length_exceeded",
            )

    def close(self) -> None:
        self._workers.shutdown(wait=False, cancel_futures=True)
