"""serve, chat and interactive over several ranks: they answer as one process does, and end as they should."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys

import psutil
import pytest
from parallel.start import PLAIN, free_port, kill, rank_environment, rank_of, start, torchrun
from serve.live import ADDRESS, BYTES, Live, eventually
from tiny import make_folder, write_tekken

from maestrale import LLM, SamplingParams

PROMPTS = ["Once upon a time", "A much longer prompt than the others are, which takes some steps", "B"]
LONG = {"prompt": "Once", "max_tokens": 2000, "temperature": 0, "ignore_eos": True, "stream": True}
STAGES = ("--dtype", "float32", "--num-pipeline-ranks", 2, "--max-batch-tokens", 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = make_folder(tmp_path_factory.mktemp("ranks") / "bytes", BYTES)
    write_tekken(made)
    return made


@pytest.fixture(scope="module")
def alone(folder):
    return LLM(folder, dtype="float32", max_len=256)


@pytest.fixture
def server(folder):
    """Starts `maestrale serve` over two ranks by torchrun; all of it is gone at the end."""
    started = []

    def live(*options: object, launcher: tuple[object, ...] = ()) -> Live:
        program = (*torchrun(2, *launcher), "-m", "maestrale")
        started.append(Live(folder, *(options or STAGES), program=program, env=PLAIN))
        return started[-1]

    yield live
    for one in started:
        family = psutil.Process(one.process.pid).children(recursive=True) if one.process.poll() is None else []
        for child in family:  # first: they hold the other end of what is read until its end
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        one.close()


@contextlib.contextmanager
def open_stream(server: Live):
    """A long answer of which the first event has come."""
    with contextlib.closing(server.connect()) as connection:
        connection.request("POST", "/v1/completions", json.dumps(LONG), {"content-type": "application/json"})
        with connection.getresponse() as answer:
            assert answer.status == 200
            assert answer.readline().startswith(b"data: ")
            yield answer


@pytest.mark.parametrize("split", [STAGES, ("--dtype", "float32", "--tensor-parallel", 2)], ids=["stages", "shards"])
def test_a_server_over_ranks_answers_as_one_process_does(split, server, alone):
    live = server(*split)
    wanted = alone.generate(PROMPTS, SamplingParams(max_tokens=24, temperature=0))
    for prompt, completion in zip(PROMPTS, wanted, strict=True):
        (choice,) = live.complete(prompt, max_tokens=24).json["choices"]
        assert choice["text"] == completion.text
        events = live.complete(prompt, max_tokens=24, stream=True).events
        assert "".join(event["choices"][0]["text"] for event in events) == completion.text
    assert live.chat("Hello").json["choices"][0]["message"]["content"] is not None
    assert live.stop() in (0, 128 + signal.SIGTERM, 1)  # torchrun's own, who was told to end


def test_sigterm_lets_an_open_request_end_and_leaves_no_process(server):
    live = server()
    ranks = psutil.Process(live.process.pid).children()
    assert len(ranks) == 2
    with open_stream(live) as answer:
        live.process.terminate()
        rest = answer.read()
    assert rest.endswith(b"data: [DONE]\n\n")
    assert b'"finish_reason":"length"' in rest
    live.wait()
    assert psutil.wait_procs(ranks, timeout=10)[1] == []
    assert any("shutting down: 1 requests are open" in line for line in live.log)


def test_a_rank_killed_in_mid_stream_ends_it_with_an_error_event_and_the_server_with_code_6(folder):
    port = free_port()
    other = start(["-m", "maestrale", "serve", folder, *STAGES, "--port", "0"], rank_environment(1, 2, port))
    live = None
    try:
        live = Live(folder, *STAGES, env=rank_environment(0, 2, port))
        with open_stream(live) as answer:
            other.kill()
            events = answer.read().strip().split(b"\n\n")
        error = next(json.loads(event.removeprefix(b"data: ")) for event in events if b'"error"' in event)["error"]
        assert error["code"] == "engine_stopped"
        assert live.wait() == 6
        assert any(re.search("rank 0 on .*: rank 1 has gone", line) for line in live.log)
    finally:
        other.kill()
        other.communicate()
        if live is not None:
            live.close()


def test_an_idle_server_is_not_ready_once_a_request_has_met_a_dead_rank(folder):
    """Without torchrun nobody else tells rank 0; under it, its agent does at once."""
    port = free_port()
    other = start(["-m", "maestrale", "serve", folder, *STAGES, "--port", "0"], rank_environment(1, 2, port))
    live = None
    try:
        live = Live(folder, *STAGES, env=rank_environment(0, 2, port))
        assert live.get("/ready").status == 200
        other.kill()
        assert live.complete("Once").status in (500, 503)
        assert live.wait() == 6
    finally:
        other.kill()
        other.communicate()
        if live is not None:
            live.close()


def test_max_restarts_brings_a_killed_service_back_on_its_port(server):
    live = server(*STAGES, launcher=("--standalone", "--max-restarts", 1))
    first = live.complete("Once", max_tokens=12).json["choices"][0]["text"]
    before = len(live.log)
    kill(rank_of(live.process.pid, 1))
    eventually(lambda: any(ADDRESS.search(line) for line in live.log[before:]), 90)
    live.port = int(next(match[2] for line in live.log[before:] if (match := ADDRESS.search(line))))
    assert live.complete("Once", max_tokens=12).json["choices"][0]["text"] == first
    assert live.get("/ready").status == 200


@pytest.mark.parametrize("verb", ["interactive", "chat", "generate"])
def test_verbs_of_the_terminal_over_ranks_say_what_one_process_says(verb, folder):
    arguments = [verb, folder, "--max-tokens", 12, "--temperature", 0, "--dtype", "float32"]
    arguments += ["-p", "Once"] if verb == "generate" else []
    said = []
    for launcher, split in (((), ()), (torchrun(2), ("--num-pipeline-ranks", 2))):
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "maestrale", *map(str, arguments), *map(str, split)],
            input="" if verb == "generate" else "Hello\nand you?\n",
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | PLAIN,
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said[0]
    assert said[0] == said[1]


def run(verb: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *torchrun(2), "-m", "maestrale", verb, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | PLAIN,
    )


@pytest.mark.parametrize("split", ["--num-pipeline-ranks", "--tensor-parallel"])
def test_bench_tells_how_busy_each_rank_was_and_what_it_holds(split, folder):
    done = run("bench", folder, split, 2, "--batch", "1,4", "--repeats", 2, "--decode-tokens", 8, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    for found in facts["decode"].values():
        assert len(found["busy"]) == 2
        assert all(0 < share < 1 for share in found["busy"])
    weights = (folder / "consolidated.safetensors").stat().st_size
    held = [rank["weight_bytes"] for rank in facts["ranks"]]
    assert max(held) < sum(held) <= 1.1 * weights  # norms and routers lie on every shard
    assert all(rank["peak_memory_bytes"] > rank["weight_bytes"] for rank in facts["ranks"])


def test_an_adapter_over_ranks_is_refused_in_a_line_with_the_remedy(folder, tmp_path):
    done = run("generate", folder, "-p", "Once", "--adapter", tmp_path, "--num-pipeline-ranks", 2)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("maestrale: ")]
    assert set(told) == {"maestrale: adapters do not run over several ranks: merge the adapter into its model first"}
