import json

import pytest


def write_run(folder, losses, heldout=()):
    folder.mkdir(parents=True)
    lines = [{"step": step, "loss": loss} for step, loss in losses]
    lines += [{"step": step, "heldout_nats_per_token": loss} for step, loss in heldout]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def runs(tmp_path):
    write_run(tmp_path / "a.run", [(1, 5.0), (10, 4.0)], [(10, 4.25)])
    write_run(tmp_path / "b.run", [(1, 6.0), (20, 3.5)])
    return tmp_path


def test_runs_are_drawn_in_one_picture_and_their_last_losses_told(runs, command):
    picture = runs / "both.png"
    run = command("plot", runs / "a", runs / "b.run" / "log.jsonl", "--out", picture)
    assert (run.code, run.err) == (0, "")
    assert run.out == f"a: step 10, loss 4.0000, held-out 4.2500\nb: step 20, loss 3.5000\n{picture}\n"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_json_is_for_programs_and_what_is_there_is_replaced_by_force_only(runs, command):
    picture = runs / "a.png"
    picture.write_text("mine")
    refused = command("plot", runs / "a.run", "--out", picture)
    assert (refused.code, picture.read_text()) == (2, "mine")
    told = json.loads(command("plot", runs / "a.run", "--out", picture, "--force", "--json").out)
    assert told == {"out": str(picture), "runs": [{"name": "a", "step": 10, "loss": 4.0, "heldout": 4.25}]}


def test_runs_of_one_name_are_told_apart_by_their_folders(runs, command):
    other = write_run(runs / "other" / "a.run", [(3, 2.0)])
    run = command("plot", runs / "a.run", other, "--out", runs / "x.png")
    assert run.out.splitlines()[:2] == [
        f"{runs / 'a.run'}: step 10, loss 4.0000, held-out 4.2500",
        f"{other}: step 3, loss 2.0000",
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no losses yet"),
        ('{"step": 1, "loss": NaN}\n', "no losses yet"),
        ('{"step": 1, "loss": 2.0}', "no losses yet"),  # a line that is being written
        ('{"loss": 1.0}\n', "log.jsonl:1: expected a JSON object with a step"),
        ("[" * 100_000 + "\n", "log.jsonl:1: expected a JSON object with a step"),
        ("\x00\n", "log.jsonl:1: expected a JSON object with a step"),
    ],
)
def test_what_is_no_log_is_code_3_in_one_line(content, words, tmp_path, command):
    (tmp_path / "log.jsonl").write_text(content)
    run = command("plot", tmp_path / "log.jsonl", "--out", tmp_path / "x.png")
    assert (run.code, run.err.count("\n")) == (3, 1)
    assert words in run.err
    assert not (tmp_path / "x.png").exists()


def test_a_run_that_is_not_there_is_code_2(tmp_path, command):
    run = command("plot", tmp_path / "nowhere", "--out", tmp_path / "x.png")
    assert (run.code, run.err.count("\n")) == (2, 1)
    assert "nowhere: no run's log" in run.err
