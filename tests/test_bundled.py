"""The bundled models: within their size, equal to transformers on converted weights, and able to tell a story."""

import math

import pytest
import torch
import transformers
from tiny import hf_greedy, hf_logits

from maestrale import LLM, SamplingParams, one_file
from maestrale.checkpoint.convert import convert
from maestrale.launch import BUNDLED

NAMES = ["stories", "stories-moe"]
STORY = (
    "Once upon a time there lived in a small house by the forest an old woman and her grandson. Every morning the boy "
    "went out to gather sticks, and every evening he came home and told her what he had seen among the trees."
)


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def llm(name):
    return LLM(BUNDLED / name, dtype="float32", max_len=1024)


@pytest.fixture(scope="module")
def theirs(name, tmp_path_factory):
    folder = tmp_path_factory.mktemp(name) / "hf"
    convert(BUNDLED / name, folder, to="hf", dtype="float32")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def test_a_model_has_at_most_16_megabytes(name):
    assert (BUNDLED / name / "consolidated.safetensors").stat().st_size <= 16_000_000
    assert (BUNDLED / name / "README.md").is_file()


def test_one_is_dense_with_a_window_shorter_than_its_context_and_one_a_mixture_of_two_in_eight():
    dense, mixture = (LLM(BUNDLED / name, max_len=8).config for name in NAMES)
    assert dense.moe is None
    assert all(window < dense.max_position_embeddings for window in dense.sliding_window)
    assert (mixture.moe.num_experts, mixture.moe.num_experts_per_tok) == (8, 2)


def test_logits_are_transformers_beyond_the_window(llm, theirs):
    ids = llm.tokenizer.encode(" ".join([STORY] * 8))  # longer than the window
    assert len(ids) > 300
    (found,) = llm.logits([ids])
    assert torch.allclose(torch.from_numpy(found), hf_logits(theirs, ids), atol=1e-4, rtol=1e-5)


def test_logits_are_one_files(llm, name):
    ids = llm.tokenizer.encode(STORY)
    model, _ = one_file.load(BUNDLED / name)
    expected = one_file.logits(model, torch.tensor(ids))
    (found,) = llm.logits([ids], chunk_size=7)
    assert (torch.from_numpy(found) - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


def test_greedy_text_is_transformers_for_prompts_in_one_batch(llm, theirs):
    prompts = ["Once upon a time", "The old king said", STORY]
    found = llm.generate(prompts, SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))
    for prompt, completion in zip(prompts, found, strict=True):
        assert completion.token_ids == hf_greedy(theirs, llm.tokenizer.encode(prompt), 12)


def test_prompt_logprobs_are_far_better_than_chance_and_equal_transformers(llm, theirs):
    ids = llm.tokenizer.encode(STORY)
    (scored,) = llm.generate([ids], SamplingParams(max_tokens=0, prompt_logprobs=0))
    expected = hf_logits(theirs, ids).log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert torch.allclose(torch.tensor(scored.prompt_logprobs[1:]), expected, atol=1e-4)
    assert -expected.mean() < 0.55 * math.log(llm.config.vocab_size)


def test_a_story_goes_on_for_200_tokens_in_words_without_a_loop(llm):
    """At temperature 0.7: no run of eight tokens more than twice, and words that the corpus could hold."""
    params = SamplingParams(max_tokens=200, temperature=0.7, top_p=0.95, seed=7, ignore_eos=True)
    for completion in llm.generate([STORY, "One day the little girl", "The old king called his three sons"], params):
        runs = [tuple(completion.token_ids[i : i + 8]) for i in range(193)]
        assert max(runs.count(run) for run in set(runs)) <= 2
        words = completion.text.split()
        assert 100 <= len(words) <= 200
        assert sum(word.strip(".,;:!?\"'()-").isalpha() for word in words) >= 0.85 * len(words)
