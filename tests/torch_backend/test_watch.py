"""Watching a router from outside. What it sees is tested in tests/conformance/test_experts.py."""

from tiny import MIXTURE, make_folder, tokens

from maestrale import LLM, SamplingParams
from maestrale.torch_backend.moe import MixtureOfExperts


def test_nothing_is_watched_once_a_step_is_over(tmp_path):
    llm = LLM(make_folder(tmp_path / "mixture", MIXTURE), dtype="float32", backend="torch")
    llm.generate([tokens(3, 64)], SamplingParams(max_tokens=2, experts=True))
    mixtures = [m for m in llm._engine.runner.model.modules() if isinstance(m, MixtureOfExperts)]
    assert len(mixtures) == MIXTURE.n_layers
    assert not any(mixture.gate._forward_hooks for mixture in mixtures)
