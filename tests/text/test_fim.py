"""Filling in the middle: the ids that mistral-common writes, for the tokenizers that have tokens for it."""

import pytest
from mistral_common.protocol.fim.request import FIMRequest

from maestrale.errors import RequestError


@pytest.mark.parametrize("name", ["v2", "v3", "v7", "tekken"])
@pytest.mark.parametrize(
    ("prompt", "suffix"),
    [("def f(", "return 1"), ("a", ""), ("", " b"), ("é ☺", "☺ Ω\n"), ("[SUFFIX]", "[PREFIX] </s>"), ("x ", "  y")],
)
def test_ids_equal_mistral_commons(name, prompt, suffix, ours, theirs):
    tokenizer = ours(name)
    if not tokenizer.has_fim:
        pytest.skip(f"{name} has no tokens for it")
    expected = theirs(name).encode_fim(FIMRequest(prompt=prompt, suffix=suffix)).tokens
    assert tokenizer.encode_fim(prompt, suffix) == expected


def test_v1_says_that_it_has_no_tokens_for_it(ours):
    with pytest.raises(RequestError, match="fill in the middle") as error:
        ours("v1").encode_fim("a", "b")
    assert error.value.param == "model"
