"""Random walks through constraints, judged by jsonschema and re; and everything that can be wrong with a constraint."""

import json
import re
import sys
import time
from pathlib import Path

import jsonschema
import mistral_common
import numpy as np
import pytest
from tiny import CONTROLS, letters, write_tekken

from maestrale.errors import RequestError, UsageError
from maestrale.sampling.constraint import Constraint, read_constraint
from maestrale.sampling.grammar import Grammars
from maestrale.text.tokenizer import load_tokenizer
from maestrale.text.vocabulary import Pieces, Vocabulary

DATA = Path(mistral_common.__file__).parent / "data"
KINDS = ["v1", "v3", "bytes", "hf"]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": -5, "maximum": 120},
        "wind": {"enum": ["bora", "maestrale", "è 日本 🌬"]},
        "more": {"type": "array", "items": {"$ref": "#/$defs/pair"}, "maxItems": 2},
    },
    "required": ["name", "age", "wind"],
    "additionalProperties": False,
    "$defs": {"pair": {"type": "object", "properties": {"a": {"type": "boolean"}}, "additionalProperties": False}},
}
SCHEMAS = [
    PERSON,
    {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 9}, "minItems": 1, "maxItems": 3},
    {"anyOf": [{"const": {"a": [1, None]}}, {"type": "string", "pattern": "^[a-z]{3,5}é?$"}]},
    {"enum": [0, "zero", None, True, [], {}]},
]
REGEXES = [r"(yes|no), [A-Z][a-zé]{2,8}!", r"\d{4}-(0[1-9]|1[0-2])-\d\d", r"日本+?(?:é|🌬){1,3}\n?", r" ?a b {0,2}/"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """v1 and v3: SentencePiece, with pieces for bytes. bytes: a tekken of single bytes. hf: a tokenizer.json whose
    tokens begin with the sign for a space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    made = {}
    for kind, name, size in (
        ("v1", "tokenizer.model.v1", 32000),
        ("v3", "mistral_instruct_tokenizer_240323.model.v3", 32768),
    ):
        folder = tmp_path_factory.mktemp(kind)
        (folder / name).write_bytes((DATA / name).read_bytes())
        made[kind] = load_tokenizer(folder, size)
    folder = tmp_path_factory.mktemp("bytes")
    made["bytes"] = load_tokenizer(folder, write_tekken(folder))
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        "a",
        "b",
        "▁a",
        "▁b",
        "no",
        "▁yes",
        "e",
    ]
    model = Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, [("▁", "a"), ("▁", "b")], unk_token="<unk>", byte_fallback=True)
    )
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    model.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    model.add_special_tokens(["<s>", "</s>", "[INST]", "[/INST]"])
    folder = tmp_path_factory.mktemp("hf")
    (folder / "tokenizer.json").write_text(model.to_str())
    made["hf"] = load_tokenizer(folder, model.get_vocab_size() + 5)  # an embedding that is padded
    return made


def ids_of(matcher):
    """All that may come, ascending; and what is said to be the only one is."""
    only, found = (
        matcher.only(),
        np.unpackbits(np.frombuffer(matcher.mask().bits, np.uint8), bitorder="little").nonzero()[0],
    )
    assert only is None or found.tolist() == [only]
    return found


def walk(tokenizer, constraint, seed, reply=True, limit=400):
    """A text made of random allowed tokens, the end of sequence as soon as it may come half of the time."""
    prompt = [] if reply else tokenizer.encode("So", bos=True)
    decoder = tokenizer.stream(after=prompt)
    matcher = tokenizer.grammars.matcher(read_constraint(constraint), decoder.drops_space)
    draw, text = np.random.default_rng(seed), ""
    for _ in range(limit):
        if matcher.finished:
            return text + decoder.finish()
        likely = [tokenizer.eos_id, *(int(token) for token in draw.integers(tokenizer.vocab_size, size=9))]
        alone = [token in matcher for token in likely]  # asked for one by one, before all are worked out
        allowed = ids_of(matcher)
        assert allowed[-1] < tokenizer.vocab_size
        assert alone == [token in allowed for token in likely]
        if tokenizer.eos_id in allowed and draw.random() < 0.5:
            return text + decoder.finish()
        token = int(draw.choice(allowed[allowed != tokenizer.eos_id]))
        assert tokenizer._vocabulary.pieces.shown[token] is not None, "a control token"
        matcher.consume(token)
        text += decoder.push(token)
    raise AssertionError(f"no end after {limit} tokens: {text[-100:]!r}")


@pytest.mark.parametrize("reply", [True, False], ids=["reply", "continuation"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_random_walk_through_a_schema_ends_in_json_that_fits_it(kind, reply, tokenizers):
    for i, schema in enumerate(SCHEMAS):
        for seed in range(8):
            text = walk(tokenizers[kind], {"json_schema": schema}, 100 * i + seed, reply)
            jsonschema.validate(json.loads(text), schema)
            assert not text[0].isspace()


@pytest.mark.parametrize("reply", [True, False], ids=["reply", "continuation"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_random_walk_through_a_regex_ends_in_a_text_that_matches_it(kind, reply, tokenizers):
    for i, regex in enumerate(REGEXES):
        for seed in range(8):
            text = walk(tokenizers[kind], {"regex": regex}, 100 * i + seed, reply)
            assert re.fullmatch(regex, text, re.ASCII), text


@pytest.mark.parametrize("kind", KINDS)
def test_a_random_walk_through_a_grammar_is_one_of_its_texts(kind, tokenizers):
    """Brackets that match, which no regex can say."""
    grammar = 'start: pair\npair: "(" (pair | "x"){0,2} ")"'
    for seed in range(8):
        text = walk(tokenizers[kind], {"grammar": grammar}, seed)
        while "(" in text:
            text, before = re.sub(r"\((x|p){0,2}\)", "p", text), text
            assert text != before
        assert text == "p"


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizers_own_spelling_is_allowed_and_the_end_only_where_the_text_is_complete(kind, tokenizers):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode('{"name": "Zoë 🌬", "age": 12, "wind": "bora"}', bos=False)
    matcher = tokenizer.grammars.matcher(read_constraint({"json_schema": PERSON}), tokenizer.stream().drops_space)
    for token in ids:
        assert token in matcher
        assert tokenizer.eos_id not in matcher
        assert not matcher.finished
        matcher.consume(token)
    assert tokenizer.eos_id in matcher


@pytest.mark.parametrize("kind", KINDS)
def test_a_free_text_may_be_spelled_byte_by_byte_but_not_end_inside_a_character(kind, tokenizers):
    tokenizer = tokenizers[kind]
    single = {piece: i for i, piece in enumerate(tokenizer._vocabulary.pieces.shown) if piece and len(piece) == 1}
    matcher = tokenizer.grammars.matcher(read_constraint({"regex": "[Zoë 🌬]+"}), False)
    read = b""
    for byte in "Zoë 🌬 o".encode():
        token, read = single[bytes([byte])], read + bytes([byte])
        assert token in matcher
        matcher.consume(token)
        assert (tokenizer.eos_id in matcher) == ("\ufffd" not in read.decode(errors="replace"))
    assert single[b"\xac"] not in matcher


def test_a_text_that_may_end_or_go_on_allows_both_and_is_not_finished(tokenizers):
    tokenizer = tokenizers["bytes"]
    matcher = tokenizer.grammars.matcher(read_constraint({"regex": "a{1,2}"}), False)
    a = tokenizer.encode("a", bos=False)[0]
    assert tokenizer.eos_id not in matcher
    matcher.consume(a)
    assert set(ids_of(matcher)) == {a, tokenizer.eos_id}
    assert not matcher.finished
    matcher.consume(a)
    assert set(ids_of(matcher)) == {tokenizer.eos_id}
    assert matcher.finished


def test_matchers_of_one_constraint_are_compiled_once_and_go_their_own_ways(tokenizers, monkeypatch):
    grammars = Grammars(tokenizers["bytes"]._vocabulary)
    compiled = []
    real = grammars._compile
    monkeypatch.setattr(grammars, "_compile", lambda *asked: compiled.append(asked) or real(*asked))
    first, second = (grammars.matcher(read_constraint({"regex": "ab|cd"}), False) for _ in range(2))
    a, b, c, d = tokenizers["bytes"].encode("abcd", bos=False)
    first.consume(a)
    third = first.copy()
    second.consume(c)
    assert [ids_of(m).tolist() for m in (first, second, third)] == [[b], [d], [b]]
    first.consume(b)
    assert (first.finished, third.finished) == (True, False)
    assert len(compiled) == 1
    assert ids_of(grammars.matcher(read_constraint({"regex": "ab|cd"}), False)).tolist() == [a, c]


# What cannot be held to

WRONG = [
    *({"regex": regex} for regex in ("[", "a(?=b)", r"(\w+)\1", r"[^\s\S]", "a{3,2}", "(" * 5000 + ")" * 5000)),
    *({"regex": regex} for regex in ("(a{1000}){1000}", "((((a{1,100}){1,100}){1,100}){1,100}){1,100}")),
    *({"grammar": grammar} for grammar in ("", "start: a", "start: start", 'begin: "a"', "start: gen(x)", "\x00")),
    {"grammar": "start: " + "(" * 3000 + '"a"' + ")" * 3000},
    {"grammar": "start: <[99999]>"},
    *({"json_schema": schema} for schema in (False, {"type": "wind"}, {"enum": []}, {"$ref": "#/absent"})),
    {"json_schema": {"$ref": "http://127.0.0.1:9/schema.json"}},
    {"json_schema": {"type": "string", "minLength": 5, "maxLength": 2}},
    {"json_schema": {"allOf": [{"type": "string"}, {"type": "integer"}]}},
    {"json_schema": {"type": "object", "required": ["a"], "properties": {"a": False}}},
    {"json_schema": {"type": "string", "pattern": "["}},
    {"json_schema": {"not": {"type": "object"}}},
]


def begin(tokenizer, constraint):
    """The first tokens: too complex may show at a later one only."""
    matcher = tokenizer.grammars.matcher(constraint, False)
    for _ in range(20):
        matcher.consume(int(ids_of(matcher)[-1]))


@pytest.mark.parametrize("constraint", WRONG, ids=lambda value: repr(value)[:40])
def test_what_is_wrong_unsupported_or_impossible_is_told_in_one_line_within_a_second(constraint, tokenizers):
    tokenizer = tokenizers["v3"]
    tokenizer.grammars.matcher(read_constraint({"regex": "warm"}), False)
    start = time.thread_time()
    with pytest.raises(RequestError) as error:
        begin(tokenizer, read_constraint(constraint, "response_format"))
    assert time.thread_time() - start < 1
    assert error.value.param == "response_format"
    assert str(error.value).startswith("response_format: ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 350


def test_an_impossible_text_beside_calls_is_told_as_the_formats_fault(tokenizers):
    tokenizer = tokenizers["v3"]
    tools = [{"type": "function", "function": {"name": "now"}}]
    content = read_constraint({"json_schema": False}, "response_format")
    with pytest.raises(RequestError) as error:
        tokenizer.grammars.matcher(tokenizer.tool_constraint(tools, "auto", None, content), True)
    assert error.value.param == "response_format"


def test_a_way_that_leads_nowhere_is_an_error_where_it_ends(tokenizers):
    tokenizer = tokenizers["bytes"]
    matcher = tokenizer.grammars.matcher(read_constraint({"grammar": 'start: "a" /[^\\s\\S]/'}), False)
    matcher.consume(tokenizer.encode("a", bos=False)[0])
    assert not any(token in matcher for token in range(tokenizer.vocab_size))
    with pytest.raises(RequestError, match="no text can satisfy it"):
        ids_of(matcher)


def test_without_the_library_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UsageError, match=r"pip install 'maestrale\[serve\]'"):
        letters().grammars.matcher(Constraint("regex", "A"), False)


def test_control_tokens_of_like_names_are_told_apart():
    shown = [None] * 6 + [b"a", b"b"]
    controls = {"<s>": 0, "</s>": 1, "[X]": 2, "<X>": 3, "[TOOL_CALLS]": 4}
    vocabulary = Vocabulary(
        kind="hf",
        chat_version=None,
        bos_id=0,
        eos_id=1,
        controls=controls,
        pieces=Pieces(shown=shown, opening={}, errors="replace", control_breaks=False),
        encode_text=lambda text: [6 + "ab".index(letter) for letter in text],
        path=Path("made"),
    )
    for token in (2, 3, 4, 5):
        matcher = Grammars(vocabulary).matcher(Constraint(None, calls=f"calls: <[{token}]>", must_call=True), False)
        assert ids_of(matcher).tolist() == [token]
    assert ids_of(Grammars(vocabulary).matcher(Constraint(None), False)).tolist() == [1, 6, 7]
    assert "[TOOL_CALLS]" in CONTROLS
