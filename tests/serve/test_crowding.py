"""Faults 63 and 64, a crowd and too few pages: each gets the text it would get alone, or is told to come again."""

import threading
import time

from live import LONG, eventually, open_request, read_all, read_events

from maestrale import LLM, SamplingParams

SLOW = LONG | {"temperature": 1.5, "seed": 1, "top_p": 0.99}  # drawn, so that no draft foretells it: 0.3 s and more


def test_a_full_queue_answers_429_with_retry_after(start):
    server = start("--max-sequences", 1, "--max-queue", 2)
    running = open_request(server, "/v1/completions", SLOW)
    eventually(lambda: server.metric("maestrale_engine_running") == 1, 20)
    waiting = [open_request(server, "/v1/completions", SLOW) for _ in range(2)]
    eventually(lambda: server.metric("maestrale_queued_requests") == 2, 20)
    for answer in (server.complete("Once"), server.complete("Once", stream=True), server.chat("Hello")):
        assert (answer.status, answer.error["type"]) == (429, "rate_limit_error")
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.headers["x-should-retry"] == "true"
    assert server.get("/ready").status == 200
    for connection in (running, *waiting):
        connection.close()
    eventually(lambda: server.pages_used() == 0, 5)
    assert server.complete("Once").status == 200


def test_many_threads_are_served_at_once_with_their_own_texts(bytes_server, bytes_folder):
    """Greedy text over HTTP is LLM.generate's, whatever runs beside it."""
    prompts = [f"{'ab' * (i % 7)} number {i}" for i in range(24)]
    alone = LLM(bytes_folder).generate(prompts, SamplingParams(max_tokens=40, temperature=0))
    found: dict[int, str] = {}

    def ask(i: int) -> None:
        if i % 2:
            found[i] = bytes_server.complete(prompts[i], max_tokens=40).json["choices"][0]["text"]
        else:
            events = bytes_server.complete(prompts[i], max_tokens=40, stream=True).events
            found[i] = "".join(event["choices"][0]["text"] for event in events)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(len(prompts))] == [completion.text for completion in alone]


SMALL = """
import sys
from maestrale import launch
launch.cache_budget = lambda available, weights: {budget}
from maestrale.cli import main
main()
"""


def test_where_pages_run_out_texts_are_the_same(start, bytes_folder):
    """Room for one and a half sequences of 512 tokens: eight of 300 preempt each other all the time."""
    program = ("-c", SMALL.format(budget=int(1.5 * 512 * 2 * 2 * 2 * 8 * 4)))
    server = start("--max-len", 512, "--threads", 2, program=program)
    prompts = [f"{i} bottles of beer on the wall" for i in range(8)]
    alone = LLM(bytes_folder).generate(prompts, SamplingParams(max_tokens=300, temperature=0, ignore_eos=True))
    answer = server.complete(prompts, max_tokens=300, ignore_eos=True)
    assert [choice["text"] for choice in answer.json["choices"]] == [completion.text for completion in alone]
    assert server.metric("maestrale_preemptions_total") > 0
    assert server.pages_used() == 0


def test_silence_is_broken_by_pings(bytes_folder, start):
    """One sequence at a time: the second stream is silent until the first is done."""
    server = start("--max-sequences", 1, "--ping", 0.02)
    first = open_request(server, "/v1/completions", SLOW)
    eventually(lambda: server.metric("maestrale_engine_running") == 1, 20)
    second = open_request(server, "/v1/completions", LONG | {"stream": True, "max_tokens": 2})
    content = read_all(second)
    assert content.startswith(b": ping\n\n")
    assert read_events(content)
    first.close()
    second.close()


def test_a_streams_events_keep_their_distance_and_lose_nothing(start):
    fields = {"max_tokens": 600, "ignore_eos": True, "logprobs": 1}
    texts, counts = [], []
    for interval in (0, 0.2):
        server = start("--stream-interval", interval)
        began = time.monotonic()
        events = [event["choices"][0] for event in server.complete("Once", stream=True, **fields).events]
        most = (time.monotonic() - began) / interval + 2 if interval else 600
        assert 1 < len(events) <= most
        counts.append(len(events))
        texts.append("".join(event["text"] for event in events))
        assert sum(len(event["logprobs"]["tokens"]) for event in events) == 600
        assert [event["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["length"]
    assert texts[0] == texts[1] == server.complete("Once", **fields).json["choices"][0]["text"]
    assert counts[0] > 2 * counts[1]
