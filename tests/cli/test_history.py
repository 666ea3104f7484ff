import stat

import pytest

from maestrale.cli.history import KEPT, History, history_path


@pytest.mark.parametrize(
    ("state", "expected"),
    [("/var/state", "/var/state"), ("", "/home/me/.local/state"), ("relative", "/home/me/.local/state")],
)
def test_the_file_is_in_the_state_folder(monkeypatch, state, expected):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_STATE_HOME", state)
    assert str(history_path()) == f"{expected}/maestrale/history"


def test_a_user_without_a_home_is_warned_and_nothing_is_kept(monkeypatch):
    def no_entry(*_):
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", no_entry)
    with pytest.warns(UserWarning, match="history is not kept: no home folder"):
        history = History(history_path())
    history.add("a line")
    assert history.entries == []


def test_lines_are_kept_for_the_next_run_at_once(tmp_path):
    path = tmp_path / "a" / "b" / "history"
    history = History(path)
    for line in ("one", "  ", "due è"):
        history.add(line)
    assert path.read_text(encoding="utf-8") == "one\ndue è\n"
    history.close()
    assert History(path).entries == ["one", "due è"]


@pytest.mark.parametrize("entry", ["two\nlines", "back\\slash", "\\n is no line end", "a\\\nb", "\u2028 \x0b stay"])
def test_an_entry_of_several_lines_comes_back_as_one(tmp_path, entry):
    history = History(tmp_path / "history")
    history.add(entry)
    history.add("next")
    history.close()
    assert (tmp_path / "history").read_text().count("\n") == 2
    assert History(tmp_path / "history").entries == [entry, "next"]


def test_others_cannot_read_it_even_if_they_could_before(tmp_path):
    path = tmp_path / "history"
    path.write_text("secret\n")
    path.chmod(0o644)
    History(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "target").write_text("precious")
    (tmp_path / "history").symlink_to(tmp_path / "target")
    with pytest.warns(UserWarning, match="history is not kept"):
        history = History(tmp_path / "history")
    history.add("line")
    history.close()
    assert (tmp_path / "target").read_text() == "precious"


def test_a_long_history_is_cut_to_its_end(tmp_path):
    path = tmp_path / "history"
    path.write_text("".join(f"{i}\n" for i in range(3 * KEPT)))
    history = History(path)
    history.close()
    assert path.read_text().split() == history.entries == [str(i) for i in range(2 * KEPT, 3 * KEPT)]
