"""Other people's programs, unchanged, against the real server.

OpenAI's newest client runs in this environment. Each of the others has requirements of its own and runs in a virtual
environment of that name under the folder that MAESTRALE_CLIENTS names, made by `tests/serve/clients/install.sh FOLDER`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "clients"
ROOM = os.environ.get("MAESTRALE_CLIENTS")


def program(environment: str, name: str) -> Path:
    if ROOM is None:
        pytest.skip("MAESTRALE_CLIENTS names no folder of clients: see tests/serve/clients/install.sh")
    path = Path(ROOM) / environment / "bin" / name
    if not path.exists():
        pytest.skip(f"{path} is not installed")
    return path


def run(*command: object, cwd: Path | None = None, **environment: str) -> str:
    found = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")} | environment,
    )
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-4000:]
    return found.stdout + found.stderr


def test_the_newest_openai_client(stories):
    pytest.importorskip("openai")
    assert "ok" in run(sys.executable, SCRIPTS / "openai_client.py", stories.url)


def test_an_older_major_of_the_openai_client(stories):
    assert "ok 2" in run(program("openai_old", "python"), SCRIPTS / "openai_client.py", stories.url)


def test_the_mistral_client(stories):
    assert "ok" in run(program("mistralai", "python"), SCRIPTS / "mistral_client.py", stories.url)


def test_langchain(stories):
    assert "ok" in run(program("langchain", "python"), SCRIPTS / "langchain_client.py", stories.url)


TASK = """
task: fox
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""


def test_lm_eval_scores_local_tasks(stories, tmp_path):
    (tmp_path / "fox.yaml").write_text(TASK % (SCRIPTS / "fox.jsonl"))
    asked = f"model=stories,base_url={stories.url}/v1/completions,tokenizer_backend=remote,max_retries=1"
    found = run(
        program("lmeval", "lm_eval"),
        *("--model", "local-completions", "--model_args", asked, "--tasks", "fox", "--include_path", tmp_path),
        cwd=tmp_path,
        HF_HUB_OFFLINE="1",
        HF_DATASETS_OFFLINE="1",
    )
    (row,) = [line for line in found.splitlines() if line.startswith("|fox")]
    assert row.split("|")[7].strip() == "1", row  # three choices that any reader of tales gets right


def test_schemathesis_finds_no_server_error(stories):
    """Positive and negative data on every route of our own description."""
    checks = "not_a_server_error status_code_conformance content_type_conformance response_schema_conformance"
    checks += " unsupported_method negative_data_rejection"
    run(
        *(program("schema", "schemathesis"), "run", f"{stories.url}/openapi.json", "--mode", "all"),
        *("--checks", checks.replace(" ", ","), "--request-timeout", "120"),
        *("--max-examples", "20", "--seed", "1", "--generation-deterministic"),
    )
    assert stories.metric("maestrale_http_responses_total", status="500") == 0
    assert stories.complete("Once").status == 200
