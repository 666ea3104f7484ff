"""What a launcher tells a process: a mistake in it is said in a line."""

import subprocess

import pytest
from parallel.start import free_port, rank_environment, start
from tiny import DENSE, make_folder

from maestrale.errors import UsageError
from maestrale.parallel.launcher import set_rendezvous, world

GOOD = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def told(monkeypatch):
    """Sets the variables of a job, some of them changed; None takes one away."""

    def tell(**changes):
        for name, value in (GOOD | changes).items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    return tell


def test_a_rank_is_what_torchrun_says(told):
    told()
    assert world() == (1, 2, 1)
    set_rendezvous(2)


@pytest.mark.parametrize(
    "wrong", [{"RANK": None}, {"RANK": "one"}, {"LOCAL_RANK": ""}, {"RANK": "2"}, {"RANK": "-1"}, {"WORLD_SIZE": "0"}]
)
def test_ranks_that_cannot_be_are_refused(wrong, told):
    told(**wrong)
    with pytest.raises(UsageError, match=r"RANK.*WORLD_SIZE.*: start with torchrun"):
        world()


@pytest.mark.parametrize(
    "wrong", [{"MASTER_ADDR": None}, {"MASTER_PORT": None}, {"MASTER_PORT": "x"}, {"MASTER_PORT": "70000"}]
)
def test_ranks_without_a_place_to_meet_are_refused(wrong, told):
    told(**wrong)
    with pytest.raises(UsageError, match=r"MASTER_ADDR=.*MASTER_PORT=.*: start with torchrun"):
        set_rendezvous(2)


def test_a_rank_that_finds_no_other_says_so_in_a_line(tmp_path):
    folder = make_folder(tmp_path / "model", DENSE)
    alone = ["-m", "maestrale", "bench", folder, "--num-pipeline-ranks", 2, "--distributed-timeout", 1]
    process = start(alone, rank_environment(1, 2, free_port()))
    try:
        _, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 6
    (line,) = err.splitlines()
    assert line.startswith("maestrale: rank 1 on ")
    assert "rendezvous does not answer" in line
