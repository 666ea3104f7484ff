import stat
import time

from byte_models import byte_ids, byte_text
from tiny import hf_greedy

from maestrale.llm import LLM
from maestrale.sampling.params import SamplingParams

GREEDY = ("--temperature", 0, "--dtype", "float32")


def greedy_text(model, prompt, count):
    return byte_text(hf_greedy(model, byte_ids(prompt), count))


def test_an_empty_line_goes_on_with_the_text_even_within_a_character(command, models, references):
    for code in range(33, 127):
        ids = hf_greedy(references["dense"], byte_ids(chr(code)), 8)
        if min(ids) >= 32 and ids[3] - 32 >= 0xC2 and 0x80 <= ids[4] - 32 < 0xC0:
            break  # the fourth token begins a character of two bytes, the fifth ends it
    else:
        raise LookupError
    run = command("interactive", models["dense"], "--max-tokens", 4, *GREEDY, stdin=f"{chr(code)}\n\n")
    first, second = byte_text(ids[:4]), byte_text(ids[3:])
    assert (run.code, run.err) == (0, "")
    assert run.out == f"{first}\n{second}\n"


def test_a_line_is_added_to_the_text_a_word_apart(command, models, references):
    run = command("interactive", models["dense"], "--max-tokens", 4, *GREEDY, stdin="A\nthe wind\n /ends\n")
    text, out = "A", []
    for line in (None, " the wind", " /ends"):
        text += line or ""
        out.append(greedy_text(references["dense"], text, 4))
        text += out[-1]
    assert run.out == "".join(f"{said}\n" for said in out)


def test_without_a_model_it_is_the_bundled_one_wherever_it_is_called(command, monkeypatch, tmp_path):
    (tmp_path / "stories").mkdir()
    monkeypatch.chdir(tmp_path)
    run = command("interactive", stdin="/show\n")
    assert (run.code, run.err) == (0, "")
    assert run.out.startswith("model    stories: 6 layers")


def test_clear_starts_anew_and_quit_leaves(command, models, references):
    run = command("interactive", models["dense"], "--max-tokens", 4, *GREEDY, stdin="A\n/clear\nA\n/quit\nB\n")
    first = greedy_text(references["dense"], "A", 4)
    assert (run.code, run.out) == (0, f"{first}\n{first}\n")


def test_help_lists_the_commands_and_an_unknown_one_is_told(command, models):
    run = command("interactive", models["dense"], stdin="/help\n/cleer\n")
    told = run.out.splitlines()
    assert all(any(line.startswith(name) for line in told) for name in ("/clear", "/?", "/quit"))
    assert told[-1].startswith("/cleer: ")
    assert "/clear" in told[-1]


def test_a_line_that_does_not_fit_is_refused_and_the_text_stays(command, models):
    args = ("interactive", models["dense"], "--max-tokens", 4, "--max-len", 32, *GREEDY)
    run = command(*args, stdin="A\n" + "B" * 40 + "\n\n")
    assert run.code == 0
    assert run.err.count("\n") == 1
    assert "/clear" in run.err
    assert run.out == command(*args, stdin="A\n\n").out


def test_a_full_context_is_told(command, models):
    run = command("interactive", models["dense"], "--max-tokens", 40, "--max-len", 16, *GREEDY, stdin="A\n")
    assert run.out.splitlines()[-1] == "[the context of 16 tokens is full: /clear starts anew]"


def test_input_that_is_no_text_is_refused_and_the_next_line_is_served(models, spawn):
    process = spawn("interactive", models["dense"], "--max-tokens", 2, text=False)
    out, err = process.communicate(b"\xff\nA\n", timeout=30)
    assert process.returncode == 0
    assert err.startswith(b"maestrale: prompt: ")
    assert err.count(b"\n") == 1
    assert out


def test_instruct_answers_as_llm_chat_does(command, models):
    run = command("interactive", models["dense"], "--instruct", "--max-tokens", 3, *GREEDY, stdin="one\n")
    params = SamplingParams(max_tokens=3, temperature=0)
    said = LLM(models["dense"], dtype="float32").chat([{"role": "user", "content": "one"}], params)
    assert (run.code, run.out) == (0, f"{said.text}\n")


def test_ctrl_c_stops_a_reply_and_at_the_prompt_it_leaves(terminal, models, tmp_path):
    endless = ("--max-len", 10**6, "--max-tokens", 10**6, "--temperature", 0)
    screen = terminal("interactive", models["windowed"], *endless)
    screen.read_until_prompt()
    screen.type(b"maestrale\n")
    screen.read_until(b"maestrale")
    time.sleep(0.3)  # in the middle of the reply
    screen.type(b"\x03")
    screen.read_until_prompt()
    assert screen.process.poll() is None
    screen.type(b"\x03")
    assert screen.process.wait(timeout=20) == 0
    assert b"Traceback" not in screen.seen
    history = tmp_path / "state" / "maestrale" / "history"
    assert history.read_text() == "maestrale\n"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_ctrl_d_leaves_and_the_arrow_brings_back_a_line_of_the_last_run(terminal, models, tmp_path):
    history = tmp_path / "state" / "maestrale" / "history"
    history.parent.mkdir(parents=True)
    history.write_text("/help\n")
    screen = terminal("interactive", models["windowed"])
    screen.read_until_prompt()
    screen.type(b"\x10\n")  # Ctrl-P, the line before
    screen.read_until(b"/quit")
    screen.read_until_prompt()
    screen.type(b"\x04")
    assert screen.process.wait(timeout=20) == 0
    assert history.read_text() == "/help\n/help\n"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
