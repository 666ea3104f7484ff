"""A configuration file that is wrong is refused in one line that says what and where."""

from __future__ import annotations

from itertools import pairwise

import pytest

from maestrale.errors import ConfigError, UsageError
from maestrale.torch_backend.train.settings import read_settings

MODEL = "model: {dim: 16, n_layers: 1, n_heads: 2, hidden_dim: 24, vocab_size: 300}\n"
GOOD = f"data: {{train: ['*.txt'], heldout: h.txt}}\nout: there\nsteps: 5\nlr: 2e-3\n{MODEL}"


def read(tmp_path, text: str, name: str = "c.yaml", **given):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return read_settings(path, **given)


def test_yaml_and_toml_say_the_same(tmp_path):
    toml = """
    out = "there"
    steps = 5
    lr = 2e-3
    [data]
    train = ["*.txt"]
    heldout = "h.txt"
    [model]
    dim = 16
    n_layers = 1
    n_heads = 2
    hidden_dim = 24
    vocab_size = 300
    """
    assert read(tmp_path, GOOD) == read(tmp_path, toml, "c.toml")


def test_the_command_line_stands_in_for_the_file(tmp_path):
    settings = read(tmp_path, GOOD, train=["a", "b"], heldout="c", out="d")
    assert (settings.train, settings.heldout, settings.out) == (("a", "b"), "c", "d")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("steps: 5", "steps: many"), "steps = 'many': expected a whole number"),
        (("steps: 5", "steps: true"), "steps = True: expected a whole number"),
        (("steps: 5", "steps: 0"), "steps = 0: expected at least 1"),
        (("steps: 5", "step: 5"), "step: unknown key"),
        (("steps: 5\n", ""), "missing steps"),
        (("heldout: h.txt", "held: h.txt"), "data.held: unknown key"),
        ((", heldout: h.txt", ""), "missing data.heldout"),
        (("train: ['*.txt']", "train: []"), "train = []: expected a list of file patterns"),
        (("lr: 2e-3", "lr: .nan"), "lr = nan: expected a finite number above 0"),
        (("lr: 2e-3", "lr: fast"), "lr = 'fast': expected a number"),
        (("lr: 2e-3", "batch_size: 6"), "batch_size = 6 is not a multiple of micro_batch = 4"),
        ((MODEL, "model: small\n"), "model: expected keys and values, got 'small'"),
        ((MODEL, "model: [\n"), ": not YAML: "),
        (("out: there", "out: \0"), "c.yaml: not YAML: "),
        (("steps: 5", "steps: " + "[" * 3000), ": a value that cannot be read as YAML: maximum recursion depth"),
        (("steps: 5", "steps: " + "9" * 5000), ": a value that cannot be read as YAML: Exceeds the limit"),
        (("steps: 5", "steps: 2026-99-01"), ": a value that cannot be read as YAML: month must be in 1..12"),
        (("steps: 5", "steps: !!bool x"), ": a value that cannot be read as YAML: 'x'"),
        (("lr: 2e-3", "lr: " + "9" * 400), ": expected a smaller number"),
        (("lr: 2e-3", "lr: 0x" + "f" * 5000), "lr = a number of too many digits: expected a smaller number"),
        (("out: there", 'out: "a\\0b"'), "out = 'a\\x00b': holds a character of code 0"),
        ((GOOD, "words"), "expected keys and values, got 'words'"),
    ],
)
def test_a_wrong_value_is_named(tmp_path, change, message):
    with pytest.raises(UsageError) as caught:
        read(tmp_path, GOOD.replace(*change))
    assert message in str(caught.value)
    assert "c.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["steps = " + "[" * 3000, "steps = " + "9" * 5000])
def test_toml_that_the_library_cannot_read_is_named(tmp_path, text):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(UsageError, match=r"c\.toml: not TOML: ") as caught:
        read_settings(tmp_path / "c.toml")
    assert "\n" not in str(caught.value)


def test_aliases_that_unfold_to_a_billion_words_are_refused_at_once(tmp_path):
    folds = "".join(f"{after}: &{after} [{','.join([f'*{before}'] * 9)}]\n" for before, after in pairwise("abcdefghij"))
    with pytest.raises(UsageError, match=r"c\.yaml: model: expected keys and values, got \[\[") as caught:
        read(tmp_path, f"a: &a [x]\n{folds}model: *j\n")
    assert len(str(caught.value)) < 1000


def test_an_impossible_model_is_a_bad_model(tmp_path):
    with pytest.raises(ConfigError, match=r"c\.yaml: model: n_heads = 3 is not a multiple") as caught:
        read(tmp_path, GOOD.replace("n_heads: 2", "n_heads: 3, n_kv_heads: 2, head_dim: 4"))
    assert caught.value.exit_code == 3


def test_a_sequence_longer_than_the_model_is_refused(tmp_path):
    with pytest.raises(UsageError, match="seq_len = 512 is over max_position_embeddings = 64"):
        read(tmp_path, GOOD.replace("dim: 16", "dim: 16, max_position_embeddings: 64"))


def test_a_file_of_another_kind_or_none_is_refused(tmp_path):
    with pytest.raises(UsageError, match="ends in"):
        read(tmp_path, GOOD, "c.json")
    with pytest.raises(UsageError, match="not TOML"):
        read(tmp_path, GOOD, "c.toml")
    with pytest.raises(UsageError, match="cannot read"):
        read_settings(tmp_path / "absent.yaml")
