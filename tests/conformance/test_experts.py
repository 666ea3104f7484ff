"""Which experts gave each token: against the router's scores in transformers."""

import pytest
import torch
from tiny import tokens

from maestrale import LLM, SamplingParams
from maestrale.errors import RequestError

SEEN = {"temperature": 0, "ignore_eos": True, "experts": True}


@pytest.fixture
def reference(built):
    return built("mixture")[0]


@pytest.fixture
def llm(built, backend):
    return LLM(built("mixture")[1], dtype="float32", backend=backend, max_batch_tokens=8)


@torch.no_grad()
def true_experts(model, ids):
    """[positions][layers][K] by one full forward pass of transformers, the highest score first."""
    scores = model(torch.tensor([ids]), use_cache=False, output_router_logits=True).router_logits
    return torch.stack([layer.topk(2).indices for layer in scores], dim=1).tolist()


def test_each_token_names_the_experts_of_the_row_it_was_drawn_from(llm, reference):
    prompt = tokens(11, 64)  # two chunks, the first without any wanted row
    (said,) = llm.generate([prompt], SamplingParams(max_tokens=6, **SEEN))
    expected = true_experts(reference, prompt + said.token_ids)
    assert said.experts == expected[10:16]


def test_pieces_of_a_stream_add_up_to_the_whole_and_every_copy_is_told(llm):
    params = SamplingParams(max_tokens=5, n=2, experts=True, ignore_eos=True, seed=3)
    whole = llm.generate([tokens(4, 64)], params)
    pieces = list(llm.stream([tokens(4, 64)], params))
    for one in whole:
        mine = [piece for piece in pieces if piece.index == one.index]
        assert [row for piece in mine for row in piece.experts or []] == one.experts
        assert len(one.experts) == 5


def test_tokens_that_were_foretold_name_their_own_rows(llm, reference):
    prompt = tokens(6, 64, seed=4) * 3
    (said,) = llm.generate([prompt], SamplingParams(max_tokens=60, **SEEN))
    assert llm.counters().accepted > 0, "nothing was speculated on: take another prompt"
    assert said.experts == true_experts(reference, prompt + said.token_ids)[17:77]


def test_who_did_not_ask_is_not_told_and_gets_the_same_tokens(llm, reference):
    prompts = [tokens(5, 64, seed=1), tokens(9, 64, seed=2)]
    plain = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    quiet, told = llm.generate(prompts, [plain, SamplingParams(max_tokens=6, **SEEN)])
    assert quiet.experts is None
    assert told.experts == true_experts(reference, prompts[1] + told.token_ids)[8:14]
    assert [quiet.token_ids, told.token_ids] == [c.token_ids for c in llm.generate(prompts, plain)]


def test_a_dense_model_has_none(built, backend):
    llm = LLM(built("dense")[1], dtype="float32", backend=backend)
    assert llm.generate([[1, 5]], SamplingParams(max_tokens=2, **SEEN))[0].experts is None


def test_beams_are_refused_them(llm):
    with pytest.raises(RequestError, match="experts") as refused:
        llm.generate([[1, 5]], SamplingParams(beam_width=2, experts=True))
    assert refused.value.param == "experts"
