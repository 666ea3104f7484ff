"""serve, chat and interactive over several ranks: they answer as one process does, and end as they should."""

import contextlib
import json
import re
import signal
import sys

import psutil
import pytest
from parallel.start import (
    PLAIN,
    WARM,
    check_same_words,
    free_port,
    gone,
    kill,
    rank_environment,
    rank_of,
    rank_of_command,
    run,
    start,
    torchrun,
)
from serve.live import ADDRESS, BYTES, Live, eventually
from tiny import make_folder, write_tekken

from maestrale import LLM, SamplingParams

PROMPTS = ["Once upon a time", "A much longer prompt than the others are, which takes some steps", "B"]
LONG = {"prompt": "Once", "max_tokens": 2000, "temperature": 0, "ignore_eos": True, "stream": True}
TWO = (sys.executable, *torchrun(2))
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


@pytest.fixture
def unwatched(folder):
    """(server, the process of its rank 1) without torchrun, whose agent would end one as soon as the other has."""
    port = free_port()
    other = start(["-m", "maestrale", "serve", folder, *STAGES, "--port", "0"], rank_environment(1, 2, port))
    with contextlib.ExitStack() as ended:
        ended.callback(other.communicate)
        ended.callback(other.kill)
        live = Live(folder, *STAGES, env=rank_environment(0, 2, port))
        ended.callback(live.close)
        yield live, other


def test_a_rank_killed_in_mid_stream_ends_it_with_an_error_event_and_the_server_with_code_6(unwatched):
    live, other = unwatched
    with open_stream(live) as answer:
        other.kill()
        events = answer.read().strip().split(b"\n\n")
    error = next(json.loads(event.removeprefix(b"data: ")) for event in events if b'"error"' in event)["error"]
    assert error["code"] == "engine_stopped"
    assert live.wait() == 6
    assert any(re.search("rank 0 on .*: rank 1 has gone", line) for line in live.log)


def test_an_idle_server_is_not_ready_once_a_request_has_met_a_dead_rank(unwatched):
    live, other = unwatched
    assert live.get("/ready").status == 200
    other.kill()
    assert live.complete("Once").status in (500, 503)
    assert live.wait() == 6


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "streaming"])
def test_ranks_end_with_their_torchrun_however_that_ends(busy, server):
    live = server()
    ranks = psutil.Process(live.process.pid).children()
    assert len(ranks) == 2
    try:
        with open_stream(live) if busy else contextlib.nullcontext():
            live.process.kill()
            eventually(lambda: all(gone(rank) for rank in ranks), 20)
    finally:
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.kill()


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
    arguments = [folder, "--max-tokens", 12, "--temperature", 0, "--dtype", "float32"]
    arguments += ["-p", "Once"] if verb == "generate" else []
    said = "" if verb == "generate" else "Hello\nand you?\n"
    check_same_words(TWO, ("--num-pipeline-ranks", 2), verb, *arguments, said=said)


@pytest.mark.parametrize("split", ["--num-pipeline-ranks", "--tensor-parallel"])
def test_bench_tells_how_busy_each_rank_was_and_what_it_holds(split, folder):
    arguments = [folder, split, 2, "--batch", "1,4", "--repeats", 2, "--decode-tokens", 8, "--json"]
    done = run("bench", *arguments, launcher=TWO)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    for found in facts["decode"].values():
        assert len(found["busy"]) == 2
        assert all(0 < share < 1 for share in found["busy"])
    weights = (folder / "consolidated.safetensors").stat().st_size
    held = [rank["weight_bytes"] for rank in facts["ranks"]]
    assert max(held) < sum(held) <= 1.1 * weights  # norms and routers lie on every shard
    assert all(rank["peak_memory_bytes"] > rank["weight_bytes"] for rank in facts["ranks"])


REFUSED = {  # what does not run over ranks → what is said
    "generate -p Once --weights fp8": "weights fp8 do not run over several ranks: start a single process",
    "generate -p Once --cache fp8": "cache fp8 does not run over several ranks: start a single process",
    "embed --text Once": "embeddings and classes are not computed over several ranks: start a single process",
    "classify --text Once": "embeddings and classes are not computed over several ranks: start a single process",
    "generate -p Once --num-pipeline-ranks 3": "3 pipeline ranks of 1 shards are 3 processes; 2 were started: "
    "start with  torchrun --nproc-per-node 3",
    "generate -p Once --tensor-parallel 2 --backend native": "backend native: adapters and --tensor-parallel need "
    "backend torch",
}


@pytest.mark.parametrize("asked", REFUSED)
def test_what_does_not_run_over_ranks_is_refused_in_a_line_with_the_remedy(asked, folder, tmp_path):
    verb, *options = asked.split()
    port, said = free_port(), [tmp_path / "rank0", tmp_path / "rank1"]
    ranks = [
        WARM.Process(
            target=rank_of_command, args=(rank_environment(rank, 2, port), said[rank], [verb, folder, *options])
        )
        for rank in (0, 1)
    ]
    for rank in ranks:
        rank.start()
    for rank, file in zip(ranks, said, strict=True):
        rank.join(60)
        assert rank.exitcode == 2, file.read_text()
        assert file.read_text() == f"maestrale: {REFUSED[asked]}\n"
        rank.close()
