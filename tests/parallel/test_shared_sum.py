"""The sum through shared memory: exact, of the same bits on all ranks, and no hang where one dies."""

import os
import signal
import time

import numpy as np
import pytest
import torch
from parallel.start import WARM

from maestrale.native_backend import kernels
from maestrale.parallel.shared import _SLOT, SharedSum

pytestmark = pytest.mark.skipif(kernels.missing() is not None, reason=str(kernels.missing()))
SIZES = (1, 7, 4096, 65_536, 65_537, 300_001)  # a piece is 65,536 floats or 131,072 of bfloat16
ROUNDS = 40


def summand(rank, number, dtype):
    """What a rank brings to a round: the same wherever it is worked out."""
    draw = torch.Generator().manual_seed(1000 * number + rank)
    return torch.randn(SIZES[number % len(SIZES)], generator=draw).to(dtype)


def opened(rank, ranks, name, together, timeout=60):
    """As `open_shared_sum` does, by the name alone: the parent process has made the file."""
    link = SharedSum(os.open(name, os.O_RDWR), rank, ranks, timeout)
    together.wait(120)
    return link


def add_up(rank, ranks, name, together, answer):
    torch.set_num_threads(1)
    link = opened(rank, ranks, name, together)
    sums = []
    for number in range(ROUNDS):
        dtype = (torch.float32, torch.bfloat16)[number % 2]
        sums.append(link(summand(rank, number, dtype)).float().numpy())
        if (number + rank) % 5 == 0:
            time.sleep(0.003)  # each is late at times
    answer.send(sums)


def die(rank, ranks, name, together, answer):
    link = opened(rank, ranks, name, together, timeout=3)
    link(torch.ones(5))
    if rank == 1:
        answer.send("ready")
        time.sleep(60)
    begun = time.monotonic()
    try:
        link(torch.ones(5))
    except RuntimeError as error:
        answer.send((str(error), time.monotonic() - begun))


@pytest.fixture
def name(tmp_path):
    path = tmp_path / "segment"
    path.write_bytes(bytes(kernels.native.SharedSum.bytes(4, _SLOT)))
    return str(path)


def start(work, ranks, name):
    """The processes, and a pipe from each: of one queue, a process that is killed could keep the lock."""
    together = WARM.Barrier(ranks)
    pipes = [WARM.Pipe(duplex=False) for _ in range(ranks)]
    processes = [
        WARM.Process(target=work, args=(rank, ranks, name, together, answer)) for rank, (_, answer) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    return processes, [ours for ours, _ in pipes], together  # the barrier is theirs as long as it is ours


def received(pipe, seconds):
    assert pipe.poll(seconds), f"nothing came within {seconds} s"
    return pipe.recv()


@pytest.mark.parametrize("ranks", [2, 4])
def test_all_ranks_get_the_bits_of_a_sum_in_their_order(ranks, name):
    processes, pipes, _together = start(add_up, ranks, name)
    try:
        sums = [received(pipe, 120) for pipe in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    for number in range(ROUNDS):
        dtype = (torch.float32, torch.bfloat16)[number % 2]
        wanted = summand(0, number, dtype).float()
        for rank in range(1, ranks):
            wanted = wanted + summand(rank, number, dtype).float()
        for rank in range(ranks):
            assert np.array_equal(sums[rank][number], wanted.to(dtype).float().numpy()), (rank, number)


@pytest.mark.alone
@pytest.mark.parametrize(("how", "words", "longest"), [(signal.SIGKILL, "let go", 2), (signal.SIGSTOP, "timed out", 6)])
def test_a_rank_that_dies_or_hangs_is_told_of_and_not_waited_for(how, words, longest, name):
    processes, pipes, _together = start(die, 2, name)
    try:
        received(pipes[1], 120)
        os.kill(processes[1].pid, how)
        error, seconds = received(pipes[0], 30)
        assert words in error
        assert "shard 1" in error
        assert seconds < longest
    finally:
        for process in processes:
            process.kill()
            process.join()
