"""The engine in a thread of its own: jobs go in as commands, pieces of text come out to the event loop.

The event loop never waits for the engine, the engine never for a client. Two threads, two rules: the engine's thread
alone drives the model and writes `Job._requests`, `started` and `spoken`; the loop reads `started` at any time and
`_requests` when the job has ended. Everything else of a job belongs to the loop.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

from maestrale.errors import DistributedError, RequestError
from maestrale.llm import LLM, Request
from maestrale.serve.job import Chore, Job, Piece, Work, settle
from maestrale.serve.metrics import Metrics
from maestrale.serve.problems import ApiError, as_api_error

T = TypeVar("T")
News = tuple[float, Job, list[Piece]]  # when a step ended, and what it brought a job

log = logging.getLogger("maestrale.serve")

_SMOOTH, _ROUGHEST = 4, 5  # prompts whose news are told each interval; of more after up to so many intervals


class Service:
    """Runs jobs on a model. Made and used on the event loop; `start` starts the thread, `stop` ends it."""

    def __init__(
        self,
        llm: LLM,
        metrics: Metrics,
        *,
        max_queue: int,
        max_unread: int,
        timeout: float,
        stream_interval: float,
        on_death: Callable[[], None] = lambda: None,
    ):
        self.metrics = metrics
        self.draining = False
        self.death: BaseException | None = None  # what has ended the engine's thread
        self._llm, self._on_death = llm, on_death
        self._max_queue, self._max_unread, self._timeout = max_queue, max_unread, timeout
        self._stream_interval = stream_interval
        self._jobs: dict[Job, asyncio.TimerHandle] = {}
        self._commands: SimpleQueue[Callable[[], bool]] = SimpleQueue()  # each says whether to go on
        self._owners: dict[Request, tuple[Job, int]] = {}  # the engine's thread only
        self._chores: deque[Chore] = deque()  # likewise
        self._news: list[News] = []  # likewise: what the loop has not been told yet
        self._told = -math.inf  # likewise: when it was told last
        self._open_chores = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the step it is in. Jobs that are open get no more."""
        self._commands.put(lambda: False)
        self._thread.join()

    @property
    def open_jobs(self) -> int:
        return len(self._jobs)

    @property
    def queued(self) -> int:
        return sum(not job.started for job in self._jobs) + self._open_chores

    @asynccontextmanager
    async def job(self, work: Sequence[Work], streaming: bool) -> AsyncIterator[Job]:
        """A job that the engine has accepted; however it is left, nothing of it stays in the engine.

        Raises RequestError where a prompt cannot be served (then none is), ApiError 429 where the queue is full and
        503 where the server is shutting down.
        """
        job = self._submit(work, streaming)
        try:
            await job.accepted
            yield job
        finally:
            self._close(job, "cancelled")

    async def chore(self, work: Iterator[T | None]) -> T:
        """What `work` gives last; its steps are done in the engine's thread, one between two steps of the engine."""
        self._require_room()
        chore = Chore(work, self._loop.create_future())
        self._open_chores += 1
        try:
            self._commands.put(partial(self._add_chore, chore))
            return await chore.result
        finally:
            self._open_chores -= 1

    def fail_all(self, error: ApiError) -> None:
        for job in list(self._jobs):
            self._fail(job, error)

    # On the loop

    def _require_room(self) -> None:
        if self.draining or not self.alive:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5)
        if self.queued >= self._max_queue:
            self.metrics.outcomes.labels("rejected").inc()
            raise ApiError(
                429, f"{self.queued} requests are waiting already: try again later", code="queue_full", retry_after=1
            )

    def _submit(self, work: Sequence[Work], streaming: bool) -> Job:
        self._require_room()
        job = Job(work, streaming, self._loop.create_future())
        self._jobs[job] = self._loop.call_later(self._timeout, self._expire, job)
        self._commands.put(partial(self._begin, job))
        return job

    def _expire(self, job: Job) -> None:
        self._fail(job, ApiError(408, f"not done within {self._timeout:g} s: the request was cancelled"), "timeout")

    def _fail(self, job: Job, error: ApiError, outcome: str = "error") -> None:
        if not job.ended:
            job.error = error
            self._close(job, outcome)

    def _close(self, job: Job, outcome: str) -> None:
        """Ends a job, once: whoever waits for it is woken, the engine forgets it."""
        if job.ended:
            return
        job.ended = True
        self._jobs.pop(job).cancel()
        if outcome == "done":
            self.metrics.whole.observe(time.monotonic() - job.began)
        else:
            self._commands.put(partial(self._forget, job))
        self.metrics.outcomes.labels(outcome).inc()
        if not job.accepted.done():
            job.accepted.set_exception(job.error) if job.error else job.accepted.cancel()
        job._news.set()

    def _accept(self, job: Job, error: RequestError | None) -> None:
        settle(job.accepted, None, error)
        if error is not None:
            self._close(job, "refused")

    def _deliver(self, news: list[News], ends: list[tuple[Job, ApiError | None]]) -> None:
        """What some steps have brought."""
        for when, job, pieces in news:
            if job.ended:
                continue
            self.metrics.observe(job, when, pieces)
            if not job.streaming:
                continue
            if (unread := job.arrive(pieces)) > self._max_unread:
                self._fail(job, ApiError(408, f"{unread} pieces are unread: read faster"), "slow reader")
        for job, error in ends:
            if error is not None:
                self._fail(job, error)
            elif not job.ended:
                self._close(job, "done")

    @property
    def alive(self) -> bool:
        return self.death is None

    def _died(self, error: BaseException) -> None:
        self.death = error
        self.fail_all(ApiError(500, "the engine has stopped", code="engine_stopped"))
        self._on_death()

    # In the engine's thread

    def _run(self) -> None:
        try:
            while self._obey():
                if self._llm.has_work:
                    self._step()
                if self._chores:
                    self._do_chore(self._chores.popleft())
        except DistributedError as error:
            log.critical("%s", error)
            self._loop.call_soon_threadsafe(self._died, error)
        except BaseException as error:  # a fault of our own: say so, and let the supervisor start anew
            log.critical("the engine's thread has ended", exc_info=True)
            self._loop.call_soon_threadsafe(self._died, error)

    def _obey(self) -> bool:
        """Carries out all commands that are there; waits for one where nothing else is to be done. False: stop."""
        while not self._commands.empty() or not (self._llm.has_work or self._chores):
            command = self._commands.get()
            if not command():
                return False
        return True

    def _begin(self, job: Job) -> bool:
        problem = None
        try:
            for number, work in enumerate(job.work):
                request = self._llm.submit(
                    work.ids, work.params, reply=work.reply, namespace=work.tenant, adapter=work.adapter
                )
                job._requests.append(request)
                self._owners[request] = job, number
        except RequestError as error:
            self._forget(job)
            problem = error
        except Exception as error:  # a fault of our own: that request fails, the others go on
            log.exception("a request could not be begun")
            self._forget(job)
            self._loop.call_soon_threadsafe(self._fail, job, as_api_error(error))
            return True
        self._loop.call_soon_threadsafe(self._accept, job, problem)
        return True

    def _forget(self, job: Job) -> bool:
        for request in job._requests:
            self._llm.abort(request)
            self._owners.pop(request, None)
        return True

    def _add_chore(self, chore: Chore) -> bool:
        self._chores.append(chore)
        return True

    def _do_chore(self, chore: Chore) -> None:
        if chore.result.cancelled():
            return
        try:
            found = next(chore.work)
        except Exception as error:  # whatever it is, who waits for it is told
            self._loop.call_soon_threadsafe(settle, chore.result, None, as_api_error(error))
            return
        if found is None:
            self._chores.append(chore)
        else:
            self._loop.call_soon_threadsafe(settle, chore.result, found, None)

    def _step(self) -> None:
        """One step of the engine, and its news to the loop. What goes wrong with a request stands in its `error`.

        First pieces and ends are told at once, others not before an interval is over: each time costs the cores that
        compute what comes next. The more there are to tell, the longer it is.
        """
        by_job: dict[Job, list[Piece]] = {}
        for request, completion in self._llm.step():
            job, number = self._owners[request]
            if request.params.prompt_logprobs is not None:  # complete by now; the engine tells them with the last piece
                completion.prompt_logprobs = request.prompt_logprobs
                completion.prompt_top_logprobs = request.prompt_top_logprobs
            by_job.setdefault(job, []).append(Piece(number, completion))
        ends = list(self._endings())
        for request, (job, _) in self._owners.items():
            if not job.started and request.done:
                job.started = True
        now, begun = time.monotonic(), any(not job.spoken for job in by_job)
        for job, pieces in by_job.items():
            job.spoken = True
            self._news.append((now, job, pieces))
        interval = self._stream_interval * min(max(len(self._owners) / _SMOOTH, 1), _ROUGHEST)
        if ends or begun or (self._news and now >= self._told + interval):
            self._loop.call_soon_threadsafe(self._deliver, self._news, ends)
            self._news, self._told = [], now

    def _endings(self) -> Iterator[tuple[Job, ApiError | None]]:
        """The jobs that have ended, each with what it failed from. DistributedError where the model itself is gone."""
        for request in [request for request in self._owners if request.finished]:
            if request not in self._owners:
                continue  # of a job that has just failed
            job, _ = self._owners.pop(request)
            if isinstance(request.error, DistributedError):
                raise request.error
            if request.error is not None:
                log.warning("a request failed in the engine: %s", request.error, exc_info=request.error.__cause__)
                self._forget(job)
                yield job, as_api_error(request.error)
            elif all(request.finished for request in job._requests):
                yield job, None
