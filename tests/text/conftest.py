"""Tokenizers to test: the files inside the mistral-common package, and small ones made here."""

import json
import shutil

import pytest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from text_samples import DATA, FILES

from maestrale.text.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """name in FILES, new file name → a folder that holds that tokenizer alone."""

    def make(name, file_name=None):
        folder = tmp_path_factory.mktemp(name)
        shutil.copy(DATA / FILES[name][0], folder / (file_name or FILES[name][0]))
        return folder

    return make


@pytest.fixture(scope="session")
def ours(folder_of):
    """name in FILES → the tokenizer as this program loads it."""
    loaded = {}

    def get(name):
        if name not in loaded:
            loaded[name] = load_tokenizer(folder_of(name), FILES[name][1])
        return loaded[name]

    return get


@pytest.fixture(scope="session")
def theirs():
    """name in FILES → mistral-common's MistralTokenizer."""
    loaded = {}

    def get(name):
        if name not in loaded:
            loaded[name] = MistralTokenizer.from_file(DATA / FILES[name][0])
        return loaded[name]

    return get


@pytest.fixture
def write_tekken(tmp_path):
    """A tekken dictionary → a folder that holds it, and its size."""

    def write(data):
        (tmp_path / "tekken.json").write_text(json.dumps(data))
        return tmp_path, data["config"]["default_vocab_size"]

    return write
