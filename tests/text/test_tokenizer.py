import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from text_samples import DATA, FILES, TEXTS, tiny_tekken

from maestrale.errors import CheckpointError, RequestError
from maestrale.text.tokenizer import load_tokenizer

NAMES = list(FILES)


@pytest.mark.parametrize("name", NAMES)
def test_ids_equal_mistral_commons(name, ours, theirs):
    reference = theirs(name).instruct_tokenizer.tokenizer
    tokenizer = ours(name)
    for text in TEXTS:
        assert tokenizer.encode(text) == reference.encode(text, bos=True, eos=False)
        assert tokenizer.encode(text, bos=False) == reference.encode(text, bos=False, eos=False)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (reference.bos_id, reference.eos_id)
    assert tokenizer.vocab_size == reference.n_words


@pytest.mark.parametrize("name", NAMES)
def test_encoded_text_decodes_to_itself(name, ours):
    for text in TEXTS:
        expected = text.replace("▁", " ") if name.startswith("v") else text  # SentencePiece spells a space so
        assert ours(name).decode(ours(name).encode(text)) == expected


def test_v1_ids_are_the_published_ones(ours):
    assert ours("v1").encode("This is a test", bos=False) == [851, 349, 264, 1369]
    assert ours("v1").encode("") == [1]


def test_ordinary_ids_of_v2_and_v3_are_v1s_plus_768(ours):
    for text in TEXTS:
        shifted = [i + 768 for i in ours("v1").encode(text, bos=False)]
        assert ours("v2").encode(text, bos=False) == shifted
        assert ours("v3").encode(text, bos=False) == shifted


@pytest.mark.parametrize("name", NAMES)
def test_control_words_in_text_are_text(name, ours):
    tokenizer = ours(name)
    words = "<s></s><unk>[INST][/INST][TOOL_CALLS][SYSTEM_PROMPT]"
    ids = tokenizer.encode(words, bos=False)
    assert all(tokenizer._vocabulary.pieces.shown[i] is not None for i in ids)
    assert tokenizer.decode(ids) == words


@pytest.mark.parametrize("name", NAMES)
def test_control_tokens_show_nothing(name, ours):
    tokenizer = ours(name)
    ids = tokenizer.encode("one two", bos=False)
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == "one two"


@pytest.mark.parametrize("name", ["v3", "tekken"])
@pytest.mark.parametrize("wrong", [-1, 1 << 20, 1 << 70])
def test_an_id_outside_the_vocabulary_is_refused(name, wrong, ours):
    with pytest.raises(RequestError, match=f"token id {wrong} is outside") as error:
        ours(name).decode([5, wrong])
    assert error.value.param == "tokens"


def test_numpy_ids_decode(ours):
    assert ours("v1").decode(np.array([851, 349, 264, 1369])) == "This is a test"


@pytest.mark.parametrize("name", ["v1", "tekken"])
@pytest.mark.parametrize("wrong", ["a\ud83d", 3, None, b"bytes"])
def test_what_is_no_text_is_refused(name, wrong, ours):
    with pytest.raises(RequestError) as error:
        ours(name).encode(wrong)
    assert error.value.param == "prompt"


def test_endless_blanks_are_refused_where_the_library_would_panic(ours):
    with pytest.raises(RequestError, match="blanks in a row"):
        ours("tekken").encode("a" + " " * 1_000_000)
    assert ours("tekken").decode(ours("tekken").encode(" " * 100_000)) == " " * 100_000


# Which file is taken, and as what


def test_the_kind_is_read_from_the_file_not_from_its_name(folder_of):
    assert load_tokenizer(folder_of("v1", "tokenizer.model"), 32000).kind == "v1"
    assert load_tokenizer(folder_of("v3", "tokenizer.model"), 32768).kind == "v3"
    assert load_tokenizer(folder_of("v7", "tokenizer.model"), 32768).kind == "v7"
    assert load_tokenizer(folder_of("tekken", "tekken.json"), 131072).kind == "tekken"


def test_the_file_of_7b_v03_is_v3_unless_named_v2(folder_of):
    # Byte for byte the same file: mistral-common's v2, and tokenizer.model as well as tokenizer.model.v3 of 7B v0.3.
    assert load_tokenizer(folder_of("v2", "tokenizer.model.v3"), 32768).kind == "v3"
    assert load_tokenizer(folder_of("v2", "tokenizer.model"), 32768).kind == "v3"
    assert load_tokenizer(folder_of("v2", "tokenizer.model.v2"), 32768).kind == "v2"


def test_a_name_that_the_content_belies_is_refused(folder_of):
    with pytest.raises(CheckpointError, match=r"named v3, but its control tokens are those of v1"):
        load_tokenizer(folder_of("v1", "tokenizer.model.v3"), 32000)


def test_no_tokenizer_lists_what_is_accepted(tmp_path):
    with pytest.raises(CheckpointError, match=r"tekken\.json, tokenizer\.model .*tokenizer\.json"):
        load_tokenizer(tmp_path, 32000)
    with pytest.raises(CheckpointError, match="cannot look"):
        load_tokenizer(tmp_path / "absent", 32000)


def test_two_different_sentencepiece_files_are_listed(folder_of):
    folder = folder_of("v1", "tokenizer.model")
    shutil.copy(DATA / FILES["v3"][0], folder / "tokenizer.model.v3")
    with pytest.raises(CheckpointError, match=r"several different tokenizers: tokenizer\.model, tokenizer\.model\.v3"):
        load_tokenizer(folder, 32768)


def test_copies_of_one_file_are_one_tokenizer(folder_of):
    folder = folder_of("v2", "tokenizer.model")
    shutil.copy(folder / "tokenizer.model", folder / "tokenizer.model.v2")
    assert load_tokenizer(folder, 32768).kind == "v2"


def test_tekken_is_preferred_to_sentencepiece_and_that_to_hf(folder_of):
    folder = folder_of("v3", "tokenizer.model")
    (folder / "tokenizer.json").write_text("not even JSON")
    assert load_tokenizer(folder, 32768).kind == "v3"
    shutil.copy(DATA / FILES["tekken"][0], folder / "tekken.json")
    assert load_tokenizer(folder, 131072).kind == "tekken"


@pytest.mark.parametrize(("name", "vocab_size"), [("v1", 32768), ("v3", 32000), ("v1", 4096)])
def test_a_size_that_is_not_the_models_is_refused_with_both_numbers(name, vocab_size, folder_of):
    with pytest.raises(CheckpointError) as error:
        load_tokenizer(folder_of(name, "tokenizer.model"), vocab_size)
    message = str(error.value)
    assert str(FILES[name][1]) in message
    assert str(vocab_size) in message
    assert "\n" not in message
    if (name, vocab_size) == ("v1", 32768):
        assert "a v1 tokenizer (32000) beside a v0.3 model (32768)" in message


@pytest.mark.parametrize("cut", [0, 3, 5000, 200_000])
def test_a_truncated_sentencepiece_file_is_refused(cut, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((DATA / FILES["v1"][0]).read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: damaged"):
        load_tokenizer(tmp_path, 32000)


def test_a_sentencepiece_file_with_a_piece_that_is_no_utf8_is_refused(tmp_path):
    content = (DATA / FILES["v1"][0]).read_bytes()
    assert content.count("▁▁▁▁".encode()) > 0
    (tmp_path / "tokenizer.model").write_bytes(content.replace("▁▁▁▁".encode(), b"\xff" * 12))
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: damaged"):
        load_tokenizer(tmp_path, 32000)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("vocab"),
        lambda d: d.pop("config"),
        lambda d: d.update(config=None),
        lambda d: d["config"].update(pattern="("),
        lambda d: d["config"].update(version=7),
        lambda d: d["config"].update(version="seven"),
        lambda d: d["config"].update(default_vocab_size=10_000),
        lambda d: d["config"].update(default_vocab_size="260"),
        lambda d: d["vocab"][3].update(token_bytes="!!"),
        lambda d: d["vocab"][3].update(rank=4),
        lambda d: d["vocab"][259].update(token_bytes=d["vocab"][258]["token_bytes"]),
        lambda d: d["special_tokens"][1].update(token_str="</s>"),
        lambda d: d["special_tokens"].pop(1),
        lambda d: d.update(special_tokens={"a": 1}),
    ],
)
def test_a_damaged_tekken_file_is_refused_in_one_line(change, tmp_path):
    data = tiny_tekken()
    change(data)
    (tmp_path / "tekken.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"tekken\.json: damaged") as error:
        load_tokenizer(tmp_path, 292)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
@pytest.mark.parametrize("name", ["tekken.json", "tokenizer.json"])
def test_a_file_that_is_no_json_object_is_refused_in_one_line(content, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(name)) as error:
        load_tokenizer(tmp_path, 100)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tekken.json", "tokenizer.model", "tokenizer.json"])
def test_a_file_as_large_as_no_tokenizer_is_refused(name, tmp_path):
    with open(tmp_path / name, "wb") as file:
        file.truncate(1 << 40)  # without a block on the disk
    with pytest.raises(CheckpointError, match=re.escape(name) + ": larger than"):
        load_tokenizer(tmp_path, 100)


def test_loading_and_encoding_v1_imports_nothing_heavy(folder_of):
    folder = folder_of("v1", "tokenizer.model")
    program = (
        "import sys; from maestrale.text.tokenizer import load_tokenizer; "
        f"t = load_tokenizer({str(folder)!r}, 32000); assert t.decode(t.encode('ab')) == 'ab'; "
        "print([m for m in ('mistral_common', 'pydantic', 'tokenizers', 'torch', 'tiktoken') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "[]"
