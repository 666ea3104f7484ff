"""`maestrale data check`."""

import json

GOOD = {"messages": [{"role": "user", "content": "Ciao"}, {"role": "assistant", "content": "Salve"}]}
MENDABLE = [
    {"messages": [*GOOD["messages"], {"role": "user", "content": "And?"}]},
    {"conversations": [{"from": "human", "value": "Ciao"}, {"from": "gpt", "value": "Salve"}]},
    {"messages": [GOOD["messages"][0] | {"weight": 1}, GOOD["messages"][1]]},
]


def written(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_good_data_is_counted_and_estimated(command, tmp_path):
    file = written(tmp_path / "d.jsonl", GOOD, {"text": "word " * 100}, GOOD)
    done = command("data", "check", file, "--seq-len", 50, "--json")
    facts = json.loads(done.out)
    assert (done.code, facts["samples"], facts["bad_lines"], facts["over_length_lines"]) == (0, 3, 0, [2])
    text = command("data", "check", file, "--seq-len", 50).out
    assert "3 samples, 0 bad lines" in text
    assert "over the length of 50 tokens: 1 (lines 2)" in text
    assert "an epoch takes about" in text
    # 16 bytes a weight at least, of 5,180,672
    assert 16 * 5_180_672 < facts["bytes_full"] < 32 * 5_180_672


def test_bad_lines_are_listed_all_at_once_and_leave_with_3(command, tmp_path):
    file = written(tmp_path / "d.jsonl", GOOD, "{", {"messages": 3}, GOOD)
    done = command("data", "check", file)
    assert done.code == 3
    assert f"{file}:2: not JSON" in done.out
    assert f"{file}:3: messages" in done.out
    assert "2 of 4 lines cannot be used" in done.err


def test_a_mended_copy_passes_and_says_what_was_done(command, tmp_path):
    file, fixed = written(tmp_path / "d.jsonl", GOOD, "{", *MENDABLE), tmp_path / "fixed.jsonl"
    done = command("data", "check", file, "--fix", fixed, "--json")
    facts = json.loads(done.out)
    assert done.code == 0
    assert (facts["kept"], facts["mended"], facts["left_out"]) == (1, 3, 1)
    assert [json.loads(line) for line in fixed.read_text().splitlines()] == [GOOD] * 4
    assert command("data", "check", fixed).code == 0
    assert command("data", "check", file, "--fix", fixed).code == 2  # exists
    assert command("data", "check", file, "--fix", file, "--force").code == 2


def test_wrong_words_are_refused_in_a_line(command, tmp_path):
    file = written(tmp_path / "d.jsonl", GOOD)
    for arguments in (("look", file), ("check", file, "--task", "x"), ("check", file, "--seq-len", 1), ("check", "x")):
        done = command("data", *arguments)
        assert (done.code, done.err.count("\n")) == (2, 1)
