"""How a model is divided: every weight is somewhere, nothing is empty, stages are even, what cannot be is refused."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import DENSE, MIXTURE, TIED

from maestrale.config import MoeConfig
from maestrale.errors import UsageError
from maestrale.mesh import Mesh, shards, stage_layers
from maestrale.plan import tensor_plan


@st.composite
def divisions(draw):
    layers = draw(st.integers(1, 9))
    heads, kv_heads = draw(st.sampled_from([(4, 1), (4, 2), (4, 4), (8, 2), (6, 3)]))
    config = replace(
        DENSE,
        n_layers=layers,
        sliding_window=(None,) * layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        hidden_dim=draw(st.integers(8, 50)),
        vocab_size=draw(st.integers(40, 70)),
        moe=draw(st.sampled_from([None, MoeConfig(4, 2), MoeConfig(5, 1)])),
        tied_embeddings=draw(st.booleans()),
    )
    tensor = draw(
        st.sampled_from([t for t in (1, 2, 3, 4, 6, 8) if heads % t == 0 and (kv_heads % t == 0 or t % kv_heads == 0)])
    )
    groups = [e for e in (1, 2, 3, 4) if config.moe and tensor % e == 0 and e <= config.moe.num_experts]
    return config, Mesh(draw(st.integers(1, layers)), tensor, draw(st.sampled_from(groups or [1])))


@given(divisions())
def test_every_element_of_every_tensor_is_held_as_often_as_it_should(division):
    config, mesh = division
    held = {name: {} for name in tensor_plan(config)}
    for shard in shards(config, mesh):
        assert len(shard.layers) > 0
        for name, slices in shard.tensors():
            for axis, extent in enumerate(slices):
                assert 0 <= extent.start < extent.stop <= tensor_plan(config)[name].shape[axis]
            key = tuple((extent.start, extent.stop) for extent in slices)
            held[name][key] = held[name].get(key, 0) + 1
    for name, planned in tensor_plan(config).items():
        size = 0
        for key in held[name]:
            piece = 1
            for begin, end in key:
                piece *= end - begin
            size += piece
        assert size == planned.size, (
            name
        )  # distinct pieces add up to the tensor, so they neither overlap nor leave gaps


@given(st.integers(1, 40), st.integers(1, 12), st.integers(8, 100_000))
def test_the_largest_stage_is_as_small_as_can_be(layers, stages, vocabulary):
    stages = min(stages, layers)
    config = replace(DENSE, n_layers=layers, sliding_window=(None,) * layers, vocab_size=vocabulary)
    got = stage_layers(config, stages)
    assert [i for stage in got for i in stage] == list(range(layers))
    layer = sum(t.size for name, t in tensor_plan(config).items() if name.startswith("layers.0."))

    def largest(counts):
        ends = [vocabulary * config.dim * ((s == 0) + (s == stages - 1)) for s in range(stages)]
        return max(count * layer + end for count, end in zip(counts, ends, strict=True))

    def best(left, stage):  # by trying: the least possible largest stage
        end = vocabulary * config.dim * ((stage == 0) + (stage == stages - 1))
        if stage == stages - 1:
            return left * layer + end
        rest = stages - stage - 1
        return min(max(n * layer + end, cached(left - n, stage + 1)) for n in range(1, left - rest + 1))

    memory = {}

    def cached(left, stage):
        if (left, stage) not in memory:
            memory[left, stage] = best(left, stage)
        return memory[left, stage]

    assert largest([len(stage) for stage in got]) == cached(layers, 0)


@pytest.mark.parametrize(
    ("config", "mesh", "words"),
    [
        (DENSE, Mesh(3), "2 layers"),
        (DENSE, Mesh(1, 3), "1, 2, 4"),
        (DENSE, Mesh(1, 2, 2), "no experts"),
        (MIXTURE, Mesh(1, 2, 4), "divisor"),
        (TIED, Mesh(0), "at least 1"),
    ],
)
def test_a_division_that_cannot_be_is_refused_with_what_could(config, mesh, words):
    with pytest.raises(UsageError, match=words):
        shards(config, mesh)
