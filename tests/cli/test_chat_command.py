"""`maestrale chat`: its commands, its two forms, and a terminal that is really one."""

import json
import stat
import time

import pytest
from byte_models import byte_ids, byte_text, native_adapter
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from tiny import MIXTURE, hf_greedy, make_folder

from maestrale.cli.conversation import Chat
from maestrale.cli.reading import is_open, unfenced
from maestrale.cli.session import Session
from maestrale.cli.strip import colour, strip
from maestrale.cli.writing import finished, for_output, harmless, write_markdown
from maestrale.llm import LLM
from maestrale.sampling.params import SamplingParams

GREEDY = ("--max-tokens", 4, "--temperature", 0, "--dtype", "float32")


@pytest.fixture(scope="module")
def llm(models):
    return LLM(models["dense"], dtype="float32")


def answers(llm, *lines, system=None, **params):
    """What the model says to each line of a chat, asked through the library, each time with all that went before."""
    messages = [{"role": "system", "content": system}] if system else []
    said = []
    for line in lines:
        messages.append({"role": "user", "content": line})
        params = {"max_tokens": 4, "temperature": 0} | params
        said.append(llm.chat(messages, SamplingParams(**params)).text)
        messages.append({"role": "assistant", "content": said[-1]})
    return said


def out(*said):
    return "".join(f"{text}\n" for text in said)


# Forms


def test_a_chat_goes_on_turn_by_turn(command, models, llm):
    run = command("chat", models["dense"], *GREEDY, stdin="one\n\ntwo\n")
    assert (run.code, run.out, run.err) == (0, out(*answers(llm, "one", "two")), "")


def test_a_system_message_heads_the_chat(command, models, llm):
    run = command("chat", models["dense"], *GREEDY, "--system", "Be brief.", stdin="one\n")
    assert run.out == out(*answers(llm, "one", system="Be brief."))


def test_a_model_without_turns_goes_on_with_the_text_and_says_so(command):
    run = command("chat", "stories", "--max-tokens", 3, "--temperature", 0, stdin="Once upon a time\n\n")
    llm = LLM()
    first, second = llm.generate(["Once upon a time"], SamplingParams(max_tokens=6, temperature=0))[0].token_ids, []
    second = llm.tokenizer.decode_continuation([*llm.tokenizer.encode("Once upon a time"), *first[:3]], first[3:])
    first = llm.tokenizer.decode_continuation(llm.tokenizer.encode("Once upon a time"), first[:3])
    assert run.out == out(first, second)
    assert run.err.count("\n") == 1
    assert "stories" in run.err


def test_a_form_can_be_forced(command, models, references):
    run = command("chat", models["dense"], *GREEDY, "--form", "text", stdin="A\n")
    assert run.out == out(byte_text(hf_greedy(references["dense"], byte_ids("A"), 4)))


@pytest.mark.parametrize("verb", [("chat",), ("interactive", "--instruct")])
def test_an_adapter_is_talked_through_as_if_it_were_merged(command, models, tmp_path, verb):
    adapter, merged = native_adapter(tmp_path / "adapter"), tmp_path / "merged"
    command("merge", models["dense"], adapter, merged)
    ways = ((models["dense"], "--adapter", adapter), (merged,), (models["dense"],))
    said = [command(*verb, *way, *GREEDY, "--max-tokens", 12, stdin="A fox\nA hen\n").out for way in ways]
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize(
    ("args", "word"), [(("--form", "song"), "--form song"), (("--form", "text", "--system", "x"), "--system")]
)
def test_wrong_options_are_one_line_and_code_2(command, models, args, word):
    run = command("chat", models["dense"], *args)
    assert (run.code, run.out, run.err.count("\n")) == (2, "", 1)
    assert word in run.err


# Commands


def test_set_changes_what_is_asked_for(command, models, llm):
    lines = "/set max_tokens 7\none\n/clear\n/set max-tokens 2\none\n"
    run = command("chat", models["dense"], *GREEDY, stdin=lines)
    (long,), (short,) = answers(llm, "one", max_tokens=7), answers(llm, "one", max_tokens=2)
    assert run.out == out("max_tokens = 7", long, "max_tokens = 2", short)
    assert long != short


def test_set_alone_shows_the_settings_and_none_takes_one_away(command, models):
    run = command("chat", models["dense"], *GREEDY, stdin='/set seed 5\n/set seed none\n/set stop "a b"\n/set\n')
    told = run.out.splitlines()
    assert told[:3] == ["seed = 5", "seed = null", 'stop = ["a b"]']
    assert "temperature = 0.0" in told
    assert "seed = null" in told[3:]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/set warmth 3", ["warmth", "temperature"]),
        ("/set temperature hot", ["temperature", "hot", "expected"]),
        ("/set top_p 0", ["top_p", "expected"]),
        ("/set max_tokens none", ["max_tokens", "expected"]),
        ("/retry", ["/retry", "no reply"]),
        ("/experts", ["/experts", "mixture"]),
        ("/save", ["/save", "file"]),
        ("/save /no/such/file.json", ["/no/such/file.json", "no folder"]),
        ("/load", ["/load", "file"]),
        ("/clear the table", ["/clear", "nothing after it", "the table"]),
        ("/load /no/such/file.json", ["/no/such/file.json", "No such file"]),
    ],
)
def test_what_cannot_be_done_is_one_line_and_the_chat_goes_on(command, models, llm, line, words):
    run = command("chat", models["dense"], *GREEDY, stdin=f"{line}\none\n")
    assert (run.code, run.out) == (0, out(*answers(llm, "one")))
    assert run.err.count("\n") == 1
    assert run.err.startswith("maestrale: ")
    assert all(word in run.err for word in words)


def test_system_is_set_shown_and_removed(command, models, llm):
    lines = '/system\n/system Be brief.\none\n/clear\n/system ""\none\n'
    run = command("chat", models["dense"], *GREEDY, stdin=lines)
    none = "no system message; /system TEXT sets one"
    (brief,), (plain,) = answers(llm, "one", system="Be brief."), answers(llm, "one")
    assert run.out == out(none, "system: Be brief.", brief, none, plain)
    assert brief != plain


def test_retry_draws_anew_and_the_same_seed_draws_the_same_again(command, models, llm):
    args = ("--max-tokens", 8, "--temperature", 1.5, "--seed", 5, "--dtype", "float32")
    run = command("chat", models["dense"], *args, stdin="one\n/retry\n/retry\n")
    expected = [answers(llm, "one", max_tokens=8, temperature=1.5, top_p=0.95, seed=5 + i)[0] for i in range(3)]
    assert run.out == out(*expected)
    assert len(set(expected)) == 3


def test_a_retried_reply_is_the_one_that_is_kept(command, models, llm, tmp_path):
    args = ("--max-tokens", 8, "--temperature", 1.5, "--seed", 5, "--dtype", "float32")
    path = tmp_path / "kept.json"
    command("chat", models["dense"], *args, stdin=f"one\n/retry\n/save {path}\n")
    (said,) = answers(llm, "one", max_tokens=8, temperature=1.5, top_p=0.95, seed=6)
    assert json.loads(path.read_text()) == {
        "messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": said}]
    }


def test_a_saved_chat_goes_on_after_it_is_loaded(command, models, llm, tmp_path):
    path = tmp_path / "chat.json"
    saved = command("chat", models["dense"], *GREEDY, stdin=f"/system Be brief.\none\n/save {path}\n/save {path}\n")
    assert saved.err == ""
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    run = command("chat", models["dense"], *GREEDY, stdin=f"/load {path}\ntwo\n/system\n")
    second = answers(llm, "one", "two", system="Be brief.")[1]
    assert run.out.splitlines()[1:] == out(second, "system: Be brief.").splitlines()


def test_a_saved_text_goes_on_after_it_is_loaded(command, models, references, tmp_path):
    path = tmp_path / "text.json"
    command("chat", models["dense"], *GREEDY, "--form", "text", stdin=f"A\n/save {path}\n")
    first = byte_text(hf_greedy(references["dense"], byte_ids("A"), 4))
    assert json.loads(path.read_text()) == {"text": "A" + first}
    run = command("chat", models["dense"], *GREEDY, "--form", "text", stdin=f"/load {path}\n\n")
    assert run.out.endswith(out(byte_text(hf_greedy(references["dense"], byte_ids("A" + first), 4))))


def test_a_file_of_somebody_else_is_not_replaced(command, models, tmp_path):
    path = tmp_path / "precious.json"
    path.write_text("precious")
    run = command("chat", models["dense"], *GREEDY, stdin=f"/save {path}\n")
    assert run.err.count("\n") == 1
    assert str(path) in run.err
    assert path.read_text() == "precious"


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b'{"messages": 3}',
        b'{"messages": [{"role": "pirate", "content": "x"}]}',
        b'{"messages": [{"role": "user", "content": {"a": 1}}]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b"\xff",
        b"[" * 100_000,
    ],
)
def test_a_file_that_is_no_chat_is_refused_and_nothing_changes(command, models, llm, tmp_path, content):
    path = tmp_path / "chat.json"
    path.write_bytes(content)
    run = command("chat", models["dense"], *GREEDY, stdin=f"one\n/load {path}\ntwo\n")
    assert run.out == out(*answers(llm, "one", "two"))
    assert run.err.count("\n") == 1
    assert str(path) in run.err


def test_a_turn_computes_only_what_is_new(llm, monkeypatch, capsys):
    computed, step = [], llm._engine.runner.step
    monkeypatch.setattr(llm._engine.runner, "step", lambda batch: computed.append(len(batch.token_ids)) or step(batch))
    session = Session(llm, "tiny", Chat(llm.tokenizer), SamplingParams(max_tokens=4, temperature=0))
    session.reply("a" * 150)
    first = sum(computed)
    computed.clear()
    session.reply("b")
    assert first > 150
    # The template's tokens, the reply, the line, and what did not fill a page of the first turn.
    assert sum(computed) < 40 + llm._engine.runner.layout.page_size


def test_show_tells_the_context(command, models, llm):
    run = command("chat", models["dense"], *GREEDY, stdin="one\n/show\n")
    used = len(llm.tokenizer.encode_chat([{"role": "user", "content": "one"}])) + 4
    assert f"context  {used} of " in run.out


def test_several_lines_between_quotes_are_one_message(command, models, llm):
    run = command("chat", models["dense"], *GREEDY, stdin='"""one\ntwo\n\nthree"""\n"""four"""\n')
    assert run.out == out(*answers(llm, "one\ntwo\n\nthree", "four"))


# Pieces of the terminal


@given(st.text(alphabet="a \n", max_size=12))
def test_three_quotes_open_what_three_quotes_close(text):
    assert not is_open(text)
    assert is_open(f'"""{text}')
    assert not is_open(f'"""{text}"""')
    assert unfenced(f'"""{text}"""') == text.strip("\n")
    assert unfenced(text) == text


BLOCKS = st.sampled_from(
    [
        *("# Head", "words *and* more", "two\nlines", "- a\n- b", "- a\n\n  more of a", "> said\n> so", "---"),
        *(
            "```\ncode\n\n\nmore\n```",
            "| a | b |\n|---|---|\n| 1 | 2 |",
            "1. one\n2. two",
            "    indented",
            "<b>html</b>",
        ),
    ]
)


@given(st.lists(BLOCKS, max_size=6), st.integers(1, 7))
def test_markdown_cut_where_blocks_are_finished_renders_as_the_whole(blocks, size):
    """Against markdown-it on the whole. A list ends where another block begins, so none follows another here."""
    kinds = [block[0] for block in blocks]
    blocks = [b for i, b in enumerate(blocks) if i == 0 or not (kinds[i] in "-1 " and kinds[i - 1] in "-1 ")]
    text, render = "\n\n".join(blocks), MarkdownIt().enable("table").render
    done, tail = "", ""
    for start in range(0, len(text), size):
        tail += text[start : start + size]
        if end := finished(tail):
            done, tail = done + render(tail[:end]), tail[end:]
    assert done + render(tail) == render(text)


def test_markdown_is_written_once_and_whole(capsys):
    write_markdown(["# Wi", "nd\n\nsome **bo", "ld** words\n\n", "- a\n- b\n"])
    shown = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert shown == ["Wind", "some bold words", "• a", "• b"]


def test_control_characters_cannot_drive_the_terminal(monkeypatch):
    driving, still = "a\x1b]0;title\x07b\r\n\tc\x9b2J\x7f é", "a\ufffd]0;title\ufffdb\n\tc\ufffd2J\ufffd é"
    assert harmless(driving) == still
    for terminal, shown in ((True, still), (False, driving)):
        monkeypatch.setattr("sys.stdout.isatty", lambda terminal=terminal: terminal)
        assert for_output(driving) == shown


def test_a_strip_has_a_column_for_each_token_and_a_row_for_each_layer():
    experts = [[[0, 1], [2, 3]], [[3, 2], [1, 0]], [[0, 2], [0, 1]]]
    shown = strip(experts, 4, width=4)  # two columns beside the layer's number
    rows = shown.plain.splitlines()
    assert rows[:7] == ["0 ▀▀", "1 ▀▀", "", "0 ▀", "1 ▀", "", rows[6]]
    cells = [span.style for span in shown.spans if shown.plain[span.start] == "▀"]
    tokens = [experts[:2], experts[2:]]
    wanted = [token[layer] for block in tokens for layer in range(2) for token in block]
    assert cells == [f"{colour(first, 4)} on {colour(second, 4)}" for first, second in wanted]
    assert rows[6].split() == ["█", "0:", "33%", "█", "1:", "25%", "█", "2:", "25%", "█", "3:", "17%"]


@pytest.mark.parametrize("count", [2, 8, 64])
def test_experts_have_colours_of_their_own(count):
    assert len({colour(expert, count) for expert in range(count)}) == count


def test_experts_of_the_last_reply_are_shown(command, tmp_path):
    from dataclasses import replace

    from tiny import write_tekken

    folder = make_folder(tmp_path / "mixture", replace(MIXTURE, vocab_size=288))
    write_tekken(folder)
    run = command("chat", folder, *GREEDY, stdin="/experts\none\n/experts\n")
    assert run.err.count("\n") == 1  # before there is a reply
    rows = [line for line in run.out.splitlines() if "▀" in line]
    assert [row.count("▀") for row in rows] == [4] * MIXTURE.n_layers


# A terminal


def test_ctrl_c_stops_a_reply_and_the_chat_goes_on(terminal, models):
    screen = terminal("chat", models["windowed"], "--max-len", 10**6, "--max-tokens", 10**6, "--temperature", 0)
    screen.read_until_prompt()
    screen.type(b"/set min_tokens 1000000\r")  # or it may end by itself
    screen.read_until_prompt()
    screen.type(b"maestrale\r")
    screen.read_until(b"maestrale")
    time.sleep(0.5)  # in the middle of the reply
    screen.type(b"\x03")
    screen.read_until_prompt()
    screen.type(b"/show\r")
    assert b" of 1,000,000 tokens" in screen.read_until(b"settings")
    screen.read_until_prompt()
    screen.type(b"\x04")
    assert screen.process.wait(timeout=30) == 0
    assert b"Traceback" not in screen.seen


def test_ctrl_c_takes_back_what_is_typed_and_then_leaves(terminal, models, tmp_path):
    screen = terminal("chat", models["dense"], *GREEDY)
    screen.read_until_prompt()
    screen.type(b"not this")
    screen.read_until(b"not this")
    screen.type(b"\x03")
    screen.read_until_prompt()
    assert screen.process.poll() is None
    screen.type(b"\x03")
    assert screen.process.wait(timeout=30) == 0
    assert (tmp_path / "state" / "maestrale" / "history").read_text() == ""


def test_a_message_of_several_lines_can_be_typed_and_is_kept_as_one(terminal, models, tmp_path):
    screen = terminal("chat", models["dense"], *GREEDY, term="xterm-256color")
    screen.read_until_prompt()
    screen.type(b'"""one\rtwo"""\r')
    screen.read_until(b'two"""')
    screen.read_until_prompt()
    history = tmp_path / "state" / "maestrale" / "history"
    assert history.read_text() == '"""one\\ntwo"""\n'
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    screen.type(b"\x04")
    assert screen.process.wait(timeout=30) == 0
