import os
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestrale.checkpoint import jsonfile
from maestrale.checkpoint.jsonfile import parse_json, read_json
from maestrale.errors import CheckpointError


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"a": 1,}', "not JSON"),
        (b'{"a": 1} x', "not JSON"),
        (b"[1]", "expected a JSON object, got list"),
        (b'{"a": 1, "b": 2, "a": 3}', "duplicate key 'a'"),
        (b'{"m": {"x": 1, "x": 1}}', "duplicate key 'x'"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested more than 64 deep"),
        (b'{"a":' * 100_000, "nested more than 64 deep"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "too many digits"),
    ],
)
def test_bad_json_is_refused_with_its_place(tmp_path, refused, text, words):
    path = tmp_path / "params.json"
    path.write_bytes(text)
    with refused(CheckpointError, 3, path, words):
        read_json(path)


def test_brackets_inside_strings_are_no_depth():
    assert parse_json(b'{"a": "' + b"[{" * 200 + b'\\"[["}', "x") == {"a": "[{" * 200 + '"[['}


def test_hostile_quotes_cost_no_quadratic_time():
    # Two million bytes: a scan that starts over at each quote would outlast the test run.
    with pytest.raises(CheckpointError, match="not JSON"):
        parse_json(b"[" * 33 + b"]" * 33 + b'"' + b'\\"' * 1_000_000, "x")


def test_too_large_a_file_is_refused_unread(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(jsonfile, "MAX_BYTES", 100)
    path = tmp_path / "params.json"
    path.write_text('{"a": "' + "x" * 100 + '"}')
    with refused(CheckpointError, 3, path, "larger than 100 bytes"):
        read_json(path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path, refused):
    os.mkfifo(tmp_path / "params.json")
    with refused(CheckpointError, 3, tmp_path / "params.json", "not a regular file"):
        read_json(tmp_path / "params.json")


def test_a_folder_or_an_absent_file_is_refused(tmp_path, refused):
    with refused(CheckpointError, 3, tmp_path, "cannot read"):
        read_json(tmp_path)
    with refused(CheckpointError, 3, "no.json", "No such file"):
        read_json(tmp_path / "no.json")


@given(st.binary() | st.text().map(str.encode))
def test_any_bytes_give_an_object_or_a_checkpoint_error(data):
    with suppress(CheckpointError):
        assert isinstance(parse_json(data, "x"), dict)
