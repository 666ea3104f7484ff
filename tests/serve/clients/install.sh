#!/bin/sh
# Virtual environments for the clients that test_clients.py runs: sh install.sh FOLDER
set -e
make() { "${PYTHON:-python3}" -m venv "$1" && "$1/bin/pip" install --quiet "$2"; }
make "$1/openai_old" 'openai>=2,<3'
make "$1/mistralai" mistralai
make "$1/langchain" langchain-openai
make "$1/lmeval" 'lm-eval[api]'
make "$1/schema" schemathesis
