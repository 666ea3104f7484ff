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


def sizes_of(config):
    return {name: float(planned.size) for name, planned in tensor_plan(config).items()}


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
    for shard in shards(config, mesh, sizes_of(config)):
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


def every_division(layers, stages):
    if stages == 1:
        return [[layers]]
    return [[n, *rest] for n in range(1, layers - stages + 2) for rest in every_division(layers - n, stages - 1)]


@given(st.integers(1, 9), st.integers(1, 5), st.integers(8, 20_000), st.booleans(), st.floats(0.1, 3))
def test_the_slowest_stage_reads_as_little_as_memory_allows(layers, stages, vocabulary, tied, spare):
    """Against all divisions there are."""
    stages = min(stages, layers)
    config = replace(DENSE, n_layers=layers, sliding_window=(None,) * layers, vocab_size=vocabulary)
    config = replace(config, tied_embeddings=tied)
    sizes, table = sizes_of(config), vocabulary * config.dim
    layer = sum(size for name, size in sizes.items() if name.startswith("layers.0."))

    def read(counts):
        return max(n * layer + table * (s == stages - 1) for s, n in enumerate(counts))

    def held(counts):
        return max(n * layer + table * ((s == 0) + (s == stages - 1)) for s, n in enumerate(counts))

    room = spare * sum(sizes.values()) / stages
    got = stage_layers(config, stages, sizes, room)
    assert [i for stage in got for i in stage] == list(range(layers))
    counts, every = [len(stage) for stage in got], every_division(layers, stages)
    if fitting := [division for division in every if held(division) <= room]:
        assert held(counts) <= room
        assert read(counts) == min(map(read, fitting))
    else:
        assert held(counts) == min(map(held, every))


def test_stages_are_even_in_what_a_step_reads_unless_a_rank_has_too_little_memory():
    """Of 12 layers of one byte, an embedding of 4 and a head of 4: 8 layers beside 4 and the head."""
    config = replace(DENSE, n_layers=12, sliding_window=(None,) * 12)
    sizes = {f"layers.{i}.w": 1.0 for i in range(12)} | {"tok_embeddings.weight": 4.0, "output.weight": 4.0}
    assert [len(stage) for stage in stage_layers(config, 2, sizes)] == [8, 4]
    assert [len(stage) for stage in stage_layers(config, 2, sizes, room=11)] == [7, 5]
    assert [len(stage) for stage in stage_layers(config, 2, sizes, room=9)] == [6, 6]
    assert [len(stage) for stage in stage_layers(config, 2, sizes | {"output.weight": 1.0})] == [6, 6]  # int4, say


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
        shards(config, mesh, sizes_of(config))
