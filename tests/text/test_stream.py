import json
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_samples import FILES, TEXTS, tiny_tekken

from maestrale.errors import CheckpointError
from maestrale.text.stream import StreamDecoder
from maestrale.text.tokenizer import load_tokenizer
from maestrale.text.vocabulary import Pieces

SIZES = {name: FILES[name][1] for name in ("v1", "v3", "tekken")}


def streamed(decoder, ids):
    return [*(decoder.push(i) for i in ids), decoder.finish()]


def ids_below(size):
    """Ids where things happen (controls, bytes, spaces, the first words) as often as any others."""
    return st.lists(st.integers(0, 1300) | st.integers(0, size - 1), max_size=12)


@pytest.mark.parametrize("name", list(SIZES))
def test_pieces_add_up_to_mistral_commons_text_for_any_ids(name, ours, theirs):
    tokenizer, reference = ours(name), theirs(name).instruct_tokenizer.tokenizer

    @settings(max_examples=400, deadline=None)
    @given(ids_below(SIZES[name]))
    def check(ids):
        expected = reference.decode(ids)
        assert "".join(streamed(tokenizer.stream(), ids)) == expected
        assert tokenizer.decode(ids) == expected

    check()


@pytest.mark.parametrize("name", list(SIZES))
def test_random_bytes_decode_as_mistral_common_decodes_them(name, ours, theirs):
    tokenizer, reference = ours(name), theirs(name).instruct_tokenizer.tokenizer
    first = {"v1": 3, "v3": 771, "tekken": 1000}[name]

    @settings(max_examples=400, deadline=None)
    @given(st.lists(st.binary(max_size=6) | st.text(max_size=3).map(str.encode), max_size=4))
    def check(runs):
        ids = []
        for run in runs:
            ids += [first + byte for byte in run] + [tokenizer.eos_id]
        assert tokenizer.decode(ids) == reference.decode(ids)

    check()


@pytest.mark.parametrize("name", list(SIZES))
def test_no_push_shows_half_a_character(name, ours):
    tokenizer = ours(name)

    @settings(max_examples=200, deadline=None)
    @given(st.text(max_size=30).filter(lambda text: "\ufffd" not in text and "▁" not in text))
    def check(text):
        shown = ""
        for piece in streamed(tokenizer.stream(), tokenizer.encode(text)):
            shown += piece
            assert text.startswith(shown)
        assert shown == text

    check()


@pytest.mark.parametrize("name", list(SIZES))
def test_a_continuation_is_what_the_whole_text_adds_to_the_prompts(name, ours, theirs):
    tokenizer, reference = ours(name), theirs(name).instruct_tokenizer.tokenizer

    @settings(max_examples=200, deadline=None)
    @given(st.text(max_size=10), ids_below(SIZES[name]))
    def check(prompt, ids):
        prompt_ids = tokenizer.encode(prompt)
        expected = reference.decode(prompt_ids + ids).removeprefix(reference.decode(prompt_ids))
        assert tokenizer.decode_continuation(prompt_ids, ids) == expected
        assert "".join(streamed(tokenizer.stream(after=prompt_ids), ids)) == expected

    check()


@pytest.mark.parametrize("name", list(SIZES))
def test_a_copy_of_a_decoder_goes_on_as_the_decoder_does(name, ours):
    tokenizer = ours(name)

    @settings(max_examples=200, deadline=None)
    @given(ids_below(SIZES[name]), ids_below(SIZES[name]), ids_below(SIZES[name]))
    def check(before, ids, others):
        decoder = tokenizer.stream(after=before)
        copy = decoder.copy()
        streamed(copy, others)
        assert streamed(decoder.copy(), ids) == streamed(decoder, ids)

    check()


@pytest.mark.parametrize("name", list(SIZES))
def test_a_continuation_keeps_its_first_space_and_a_fresh_text_has_none(name, ours):
    tokenizer = ours(name)
    hello, both = tokenizer.encode("Hello"), tokenizer.encode("Hello world")
    assert both[: len(hello)] == hello
    assert tokenizer.decode_continuation(hello, both[len(hello) :]) == " world"
    assert tokenizer.decode_continuation([tokenizer.bos_id], tokenizer.encode("Hello", bos=False)) == "Hello"


def test_a_character_that_the_prompt_leaves_unfinished_comes_with_the_continuation(ours):
    fox = [3 + byte for byte in "🦊".encode()]
    assert ours("v1").decode_continuation(fox[:2], fox[2:]) == "🦊"
    assert ours("v1").decode(fox[:2]) == "\ufffd\ufffd"


def test_a_control_token_ends_an_unfinished_character(ours):
    decoder = ours("v3").stream()
    assert decoder.push(771 + 0xE2) == ""
    assert decoder.push(2) == "\ufffd"
    assert decoder.push(771 + 0x41) == "A"
    assert decoder.finish() == ""


# tokenizer.json


def byte_pairs(merges):
    """A byte-fallback BPE in the shape that Mistral's own tokenizer.json files have."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdehlowrté", "▁a", "he", "ll"]
    model = models.BPE(
        {token: i for i, token in enumerate(tokens)},
        [("▁", "a"), ("h", "e"), ("l", "l")][:merges],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")])
    tokenizer.add_tokens(["[plain]"])
    return tokenizer


def byte_level():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *alphabet, "he", "Ġa"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [("h", "e"), ("Ġ", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens(["naïve ☺"])
    return tokenizer


def metaspace():
    tokenizer = byte_pairs(3)
    from tokenizers import decoders

    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def undecorated():
    tokenizer = byte_pairs(3)
    tokenizer.decoder = None
    return tokenizer


MADE = {"byte_pairs": lambda: byte_pairs(3), "byte_level": byte_level, "metaspace": metaspace, "none": undecorated}


def load(model, folder, vocab_size):
    (folder / "tokenizer.json").write_text(model.to_str())
    return load_tokenizer(folder, vocab_size)


@pytest.mark.parametrize("name", list(MADE))
def test_pieces_add_up_to_the_librarys_text_for_any_ids_of_a_tokenizer_json(name, tmp_path):
    model = MADE[name]()
    size = model.get_vocab_size()
    tokenizer = load(model, tmp_path, size + 5)
    assert (tokenizer.kind, tokenizer.vocab_size) == ("hf", size + 5)

    @settings(max_examples=400, deadline=None)
    @given(st.lists(st.integers(0, size + 4) | st.integers(256, size + 4), max_size=12))
    def check(ids):
        expected = model.decode(ids, skip_special_tokens=True)
        pieces = "".join(streamed(tokenizer.stream(), ids))
        assert pieces == tokenizer.decode(ids)
        if name != "byte_pairs" or "\ufffd" not in expected:  # there, the library gives up whole runs of bytes
            assert pieces == expected

    check()


@pytest.mark.parametrize("name", ["byte_pairs", "byte_level"])
def test_a_tokenizer_json_encodes_as_the_library_does_and_never_to_control_tokens(name, tmp_path):
    model = MADE[name]()
    tokenizer = load(model, tmp_path, model.get_vocab_size())
    for text in TEXTS:
        if "<" not in text:
            assert tokenizer.encode(text, bos=False) == model.encode(text, add_special_tokens=False).ids
    ids = tokenizer.encode("<s>[INST]he</s>", bos=False)
    assert all(tokenizer._vocabulary.pieces.shown[i] is not None for i in ids if i != 0)
    assert tokenizer.bos_id not in ids
    assert tokenizer.eos_id not in ids
    assert tokenizer.encode("he")[0] == tokenizer.bos_id == model.token_to_id("<s>")


HALVES = [bytes([lead]) for lead in (0x41, 0x80, 0x90, 0xA0, 0xBF, 0xC0, 0xC3, 0xE0, 0xE2, 0xED, 0xF0, 0xF4, 0xFF)]


@pytest.mark.parametrize("breaks", [True, False], ids=["controls break", "controls vanish"])
@pytest.mark.parametrize("errors", ["replace", "surrogateescape"])
def test_what_follows_a_text_needs_no_more_of_it_than_its_two_ends(errors, breaks):
    shown = [None, b"", b" a", "é🦊".encode(), "🦊".encode()[:3], "🦊".encode()[1:], *HALVES]
    pieces = Pieces(shown, {1: b"", 2: b"a"}, errors, breaks, opening_repeats=True)
    ids = st.integers(0, len(shown) - 1)

    @settings(max_examples=3000, deadline=None)
    @given(st.lists(ids, max_size=9), st.lists(ids, max_size=3))
    def check(before, then):
        whole, ends = StreamDecoder(pieces), StreamDecoder(pieces)
        for token_id in before:
            whole.push(token_id)
        ends.follow(before)
        assert ends.drops_space == whole.drops_space
        assert streamed(ends, then) == streamed(whole, then)

    check()


@pytest.mark.parametrize("name", [*SIZES, *MADE])
def test_a_stream_after_a_prompt_is_that_of_a_decoder_that_read_all_of_it(name, ours, tmp_path):
    tokenizer = ours(name) if name in SIZES else load(MADE[name](), tmp_path, 400)
    ids = st.integers(0, min(tokenizer.vocab_size - 1, 1300)) | st.integers(0, tokenizer.vocab_size - 1)
    spelled = st.text(max_size=4).map(lambda text: tokenizer.encode(text, bos=False))
    parts = st.lists(spelled | st.lists(ids, max_size=3), max_size=5).map(lambda found: list(chain(*found)))

    @settings(max_examples=400, deadline=None)
    @given(parts, st.integers(0, 3), parts)
    def check(prompt, cut, then):
        prompt = prompt[: len(prompt) - cut]
        whole = tokenizer.stream()
        for token_id in prompt:
            whole.push(token_id)
        ends = tokenizer.stream(after=prompt)
        assert ends.drops_space == whole.drops_space
        assert streamed(ends, then) == streamed(whole, then)

    check()


def test_of_a_long_prompt_a_few_ids_are_read(ours, monkeypatch):
    tokenizer, read = ours("v3"), []
    push = StreamDecoder.push
    monkeypatch.setattr(StreamDecoder, "push", lambda self, token_id: read.append(token_id) or push(self, token_id))
    tokenizer.stream(after=tokenizer.encode("Once upon a time there was a fox. " * 500))
    assert len(read) < 10


def test_good_characters_beside_a_wrong_byte_survive_in_a_tokenizer_json(tmp_path):
    tokenizer = load(byte_pairs(3), tmp_path, 400)
    ids = [3 + byte for byte in "é".encode()] + [3 + 0xFF, 3 + 0xE2, 3 + 0x82]
    assert streamed(tokenizer.stream(), ids) == ["", "é", "\ufffd", "", "", "\ufffd\ufffd"]


def test_a_tokenizer_json_larger_than_the_model_is_refused(tmp_path):
    size = byte_pairs(3).get_vocab_size()
    with pytest.raises(CheckpointError, match=f"{size} tokens, but the model's vocab_size is {size - 1}"):
        load(byte_pairs(3), tmp_path, size - 1)


@pytest.mark.parametrize(("name", "told"), [("absent", "absent"), ("\ud800", r"\?")])
def test_a_beginning_of_text_that_is_no_token_is_refused(tmp_path, name, told):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": name}))
    with pytest.raises(CheckpointError, match=f"no token {told};"):
        load(byte_pairs(3), tmp_path, 400)


def test_ends_of_text_come_from_tokenizer_config_json(tmp_path):
    names = {"bos_token": "[INST]", "eos_token": {"content": "[/INST]", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = load(byte_pairs(3), tmp_path, 400)
    model = byte_pairs(3)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (model.token_to_id("[INST]"), model.token_to_id("[/INST]"))


def test_an_unknown_decoder_is_refused_by_name(tmp_path):
    from tokenizers import decoders

    model = byte_pairs(3)
    model.decoder = decoders.WordPiece()
    with pytest.raises(CheckpointError, match=r"WordPiece.* is not supported"):
        load(model, tmp_path, 400)


def test_a_small_tekken_decodes_as_mistral_common_decodes_it(write_tekken):
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    folder, size = write_tekken(tiny_tekken())
    tokenizer, reference = load_tokenizer(folder, size), Tekkenizer.from_file(folder / "tekken.json")

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.integers(0, size - 1), max_size=12), st.text(max_size=12))
    def check(ids, text):
        assert tokenizer.decode(ids) == reference.decode(ids)
        assert tokenizer.encode(text) == reference.encode(text, bos=True, eos=False)

    check()
