import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from byte_models import ENVIRONMENT

import maestrale
from maestrale import cli
from maestrale.errors import DiskError, MaestraleError, MemoryLimitError
from maestrale.native_backend.kernels import missing

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ENDLESS = ("--max-len", 10**6, "--max-tokens", 10**5, "--ignore-eos", "-p", "A")

HELP = """
import sys, time
sys.argv = ["maestrale", "--help"]
from maestrale.cli import main
try:
    main()
except SystemExit as left:
    heavy = {"torch", "numpy", "mistral_common", "tokenizers", "sentencepiece", "safetensors"} & set(sys.modules)
    print(left.code, sorted(heavy), time.process_time())
"""


def test_help_is_quick_and_imports_nothing_heavy():
    times = []
    for _ in range(3):
        run = subprocess.run([sys.executable, "-c", HELP], env=ENVIRONMENT, capture_output=True, text=True, check=True)
        code, heavy, seconds = run.stdout.splitlines()[-1].split(" ")
        assert (code, heavy) == ("0", "[]")
        times.append(float(seconds))
    assert min(times) < 0.3


FIRST_TOKEN = """
import sys
sys.argv = "maestrale generate -p Once --max-tokens 1 --backend native --threads 1".split()
from maestrale.cli import main
try:
    main()
except SystemExit:
    print(*sys.modules)
    import psutil
    print(psutil.Process().num_threads())
"""


@pytest.mark.skipif(missing() is not None, reason="no kernels here")
def test_nothing_that_takes_long_to_import_and_no_idle_thread_stands_before_the_first_token():
    environment = {name: value for name, value in ENVIRONMENT.items() if not name.endswith("_NUM_THREADS")}
    run = subprocess.run(
        [sys.executable, "-c", FIRST_TOKEN], env=environment, capture_output=True, text=True, check=True
    )
    first, loaded, threads = run.stdout.splitlines()
    assert first.startswith("Once")
    assert threads == "1"  # numpy's BLAS has started none of its own
    heavy = {"torch", "mistral_common", "pydantic", "tokenizers", "tiktoken", "typer", "rich", "safetensors"}
    heavy |= {"numpy.random", "hashlib", "maestrale.checkpoint.adapter", "maestrale.cli.chat"}
    assert not heavy & set(loaded.split())


@pytest.mark.parametrize("verb", [None, *cli.VERBS])
def test_help_screens_fit_80_columns(command, monkeypatch, verb):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    run = command(*([verb] if verb else []), "--help")
    assert (run.code, run.err) == (0, "")
    assert max(len(line) for line in run.out.splitlines()) <= 80
    assert all(name in run.out for name in (cli.VERBS if verb is None else ["--debug"]))


def test_no_verb_shows_the_help(command):
    run = command()
    assert run.code == 0
    assert "Usage: maestrale" in run.out


def test_version(command):
    assert command("--version").out == f"maestrale {maestrale.__version__}\n"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["dance"], ["dance", "maestrale --help"]),
        (["generat"], ["generat", "maestrale --help"]),
        (["generate", "--max-tokenz", "3"], ["--max-tokenz", "maestrale generate --help"]),
        (["generate", "--max-tokens", "many"], ["--max-tokens"]),
        (["convert", "a", "b"], ["--to"]),
        (["generate"], ["-p TEXT"]),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(command, args, words):
    run = command(*args)
    assert (run.code, run.out, run.err.count("\n")) == (2, "", 1)
    assert run.err.startswith("maestrale: ")
    assert all(word in run.err for word in words)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (MemoryLimitError("no room"), 4, "maestrale: no room\n"),
        (MemoryError(), 4, "maestrale: out of memory\n"),
        (DiskError("full"), 5, "maestrale: full\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_ends_a_verb_becomes_an_exit_code(command, monkeypatch, error, code, line):
    def verb() -> None:
        raise error

    monkeypatch.setitem(cli.VERBS, "verb", "")
    monkeypatch.setattr(cli, "find_verb", lambda name: verb)
    run = command("verb")
    assert (run.code, run.out, run.err) == (code, "", line)


@pytest.mark.parametrize("args", [["--debug", "verb"], ["verb", "--debug"]])
def test_debug_shows_the_traceback_and_keeps_the_code(command, monkeypatch, args):
    def verb() -> None:
        raise MaestraleError("gone wrong")

    monkeypatch.setitem(cli.VERBS, "verb", "")
    monkeypatch.setattr(cli, "find_verb", lambda name: verb)
    run = command(*args)
    assert run.code == MaestraleError.exit_code
    assert run.err.startswith("Traceback")
    assert run.err.endswith("gone wrong\n")


def test_a_bug_is_not_hidden(monkeypatch):
    def verb() -> None:
        raise ZeroDivisionError

    monkeypatch.setitem(cli.VERBS, "verb", "")
    monkeypatch.setattr(cli, "find_verb", lambda name: verb)
    monkeypatch.setattr(sys, "argv", ["maestrale", "verb"])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError):
        cli.main()
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_in_silence(spawn, models, number, code):
    process = spawn("generate", models["windowed"], *ENDLESS)
    assert process.stdout.read(1) == "A"
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (code, "")


INTERRUPT = "os.kill(os.getpid(), signal.SIGINT)"


@pytest.mark.parametrize("way", ["module", "script"])
def test_ctrl_c_while_the_command_line_is_imported_is_130_without_a_word(tmp_path, way):
    (tmp_path / "click.py").write_text(f"import os, signal\n{INTERRUPT}\nfrom typing import NoSuchName\n")
    module, function = PYPROJECT["project"]["scripts"]["maestrale"].split(":")
    script = ["-c", f"import sys; from {module} import {function}; sys.exit({function}())"]
    path = os.pathsep.join([str(tmp_path), str(ROOT / "src")])
    run = subprocess.run(
        [sys.executable, *(["-m", "maestrale"] if way == "module" else script), "--version"],
        env=ENVIRONMENT | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "")


@pytest.mark.parametrize(("handler", "code"), [(signal.SIG_DFL, 130), (signal.SIG_IGN, 0)])
def test_ctrl_c_while_the_interpreter_ends_is_130_without_a_word_unless_it_is_ignored(spawn, tmp_path, handler, code):
    (tmp_path / "sitecustomize.py").write_text(f"import atexit, os, signal\natexit.register(lambda: {INTERRUPT})\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT / "src")])
    process = spawn(
        "--version", env=ENVIRONMENT | {"PYTHONPATH": path}, preexec_fn=lambda: signal.signal(signal.SIGINT, handler)
    )
    assert process.communicate(timeout=20) == (f"maestrale {maestrale.__version__}\n", "")
    assert process.returncode == code


def test_a_reader_that_goes_away_is_no_error(spawn, models):
    process = spawn("generate", models["windowed"], *ENDLESS)
    assert process.stdout.read(1) == "A"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=20) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["--version"],
        ["inspect", "--help"],
        ["inspect"],
        ["generate", "-p", "A", "--max-tokens", "1"],
        ["generate", "-p", "A" * 9000, "--max-tokens", "1", "--json", "--max-len", "9100"],  # more than a buffer
    ],
)
def test_a_full_disk_under_standard_output_is_told_with_code_5(spawn, models, args, unbuffered):
    model = [] if "--help" in args or "--version" in args else [models["dense"]]
    with open("/dev/full", "w") as full:
        process = spawn(*args, *model, stdout=full, env=ENVIRONMENT | {"PYTHONUNBUFFERED": unbuffered})
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (5, "maestrale: standard output: No space left on device\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize(("args", "code"), [(["bogus"], 2), (["inspect", "/no/such/folder"], 3)])
def test_the_exit_code_does_not_depend_on_whether_an_error_can_be_told(spawn, args, code):
    with open("/dev/full", "w") as full:
        process = spawn(*args, stderr=full)
    assert (process.communicate(timeout=20)[0], process.returncode) == ("", code)


def test_closed_output_is_no_error(spawn, models):
    quiet = ENVIRONMENT | {"PYTHONWARNINGS": ""}
    process = spawn("inspect", models["dense"], stdout=None, preexec_fn=lambda: os.close(1), env=quiet)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("port = [1]", "port = [1]: expected a whole number"),
        ("max-len = 2.5", "max_len = 2.5: expected a whole number"),
        ("api-key = 3", "api_key = 3: expected a list, each a text"),
        ("api-key = [3]", "api_key = [3]: expected a list, each a text"),
        ("log-json = {a = 1}", "log_json = {'a': 1}: expected true or false"),
        ('path = ["x"]', "path = ['x']: expected a text"),
        ("drain = true", "drain = True: expected a number"),
        ("speed = 1", "no such option: speed"),
        ('"a\\u001b[2J" = 1', r"no such option: a\x1b[2J"),
        ('path = "a\\u0000b"', r"path = 'a\x00b': holds a character of code 0"),
        ("port = " + "[" * 3000, "no TOML: maximum recursion depth"),
        ("port = " + "9" * 5000, "no TOML: Exceeds the limit"),
    ],
)
def test_a_file_of_options_with_a_wrong_value_is_refused_by_name(command, tmp_path, line, words):
    (tmp_path / "serve.toml").write_text(line)
    run = command("serve", "--config", tmp_path / "serve.toml")
    assert (run.code, run.out, run.err.count("\n")) == (2, "", 1)
    assert f"serve.toml: {words}" in run.err


@pytest.mark.parametrize("host", ["a" * 100, "a..b", "\u2028"])
def test_a_host_that_can_be_no_name_is_refused(command, models, host):
    run = command("serve", models["dense"], "--host", host)
    assert (run.code, run.out, run.err.count("\n")) == (2, "", 1)
    assert "host" in run.err


def test_an_option_without_its_value_points_at_its_own_verbs_help(command):
    run = command("data", "check", "x.jsonl", "--fix")
    assert (run.code, run.out) == (2, "")
    assert run.err == "maestrale: Option '--fix' requires an argument. (see maestrale data --help)\n"
