"""The sum through shared memory: exact, of the same bits on all ranks, and no hang where one dies."""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch

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


def add_up(rank, ranks, name, together, answers):
    torch.set_num_threads(1)
    link = opened(rank, ranks, name, together)
    sums = []
    for number in range(ROUNDS):
        dtype = (torch.float32, torch.bfloat16)[number % 2]
        sums.append(link(summand(rank, number, dtype)).float().numpy())
        if (number + rank) % 5 == 0:
            time.sleep(0.003)  # each is late at times
    answers.put((rank, sums))


def die(rank, ranks, name, together, answers):
    link = opened(rank, ranks, name, together, timeout=3)
    link(torch.ones(5))
    if rank == 1:
        answers.put(os.getpid())
        time.sleep(60)
    begun = time.monotonic()
    try:
        link(torch.ones(5))
    except RuntimeError as error:
        answers.put((str(error), time.monotonic() - begun))


@pytest.fixture
def name(tmp_path):
    path = tmp_path / "segment"
    path.write_bytes(bytes(kernels.native.SharedSum.bytes(4, _SLOT)))
    return str(path)


def start(work, ranks, name):
    context = multiprocessing.get_context("spawn")
    answers, together = context.Queue(), context.Barrier(ranks)
    processes = [context.Process(target=work, args=(rank, ranks, name, together, answers)) for rank in range(ranks)]
    for process in processes:
        process.start()
    return processes, answers, together  # the barrier is theirs as long as it is ours


@pytest.mark.parametrize("ranks", [2, 4])
def test_all_ranks_get_the_bits_of_a_sum_in_their_order(ranks, name):
    processes, answers, _together = start(add_up, ranks, name)
    try:
        sums = dict(answers.get(timeout=120) for _ in processes)
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


@pytest.mark.parametrize(("how", "words", "longest"), [(signal.SIGKILL, "let go", 2), (signal.SIGSTOP, "timed out", 6)])
def test_a_rank_that_dies_or_hangs_is_told_of_and_not_waited_for(how, words, longest, name):
    processes, answers, _together = start(die, 2, name)
    try:
        os.kill(answers.get(timeout=120), how)
        error, seconds = answers.get(timeout=30)
        assert words in error
        assert "shard 1" in error
        assert seconds < longest
    finally:
        for process in processes:
            process.kill()
            process.join()
