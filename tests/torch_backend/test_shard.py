"""One rank's part of an adapter."""

import numpy as np
import pytest
from tiny import DENSE

from maestrale.checkpoint.adapter import Adapter, Delta, linear_layers
from maestrale.errors import UsageError
from maestrale.mesh import Mesh, shards
from maestrale.plan import tensor_plan
from maestrale.torch_backend.shard import part_of_adapter

SIZES = {name: float(plan.size) for name, plan in tensor_plan(DENSE).items()}


def dora(*layers):
    shapes = linear_layers(DENSE)
    deltas = {name: Delta(np.ones((2, shapes[name][1])), np.ones((shapes[name][0], 2)), 1.0) for name in layers}
    for name, delta in deltas.items():
        deltas[name] = Delta(delta.a, delta.b, delta.scale, np.arange(shapes[name][0], dtype=np.float32))
    return Adapter(deltas, "/adapters/mine")


@pytest.mark.parametrize("layer", ["layers.0.attention.wo", "layers.1.feed_forward.w2"])
def test_dora_of_a_layer_whose_inputs_are_divided_is_refused_with_the_remedy(layer):
    """The length of a row of W + B A is a sum over all shards."""
    for shard in shards(DENSE, Mesh(1, 2), SIZES):
        with pytest.raises(UsageError, match="/adapters/mine: DoRA does not run over --tensor-parallel: merge it into"):
            part_of_adapter(dora(layer), shard)


def test_dora_of_a_layer_whose_outputs_are_divided_keeps_its_rows_lengths():
    parts = [part_of_adapter(dora("layers.0.attention.wq"), shard) for shard in shards(DENSE, Mesh(1, 2), SIZES)]
    lengths = [part.deltas["layers.0.attention.wq"].magnitude for part in parts]
    assert np.concatenate(lengths).tolist() == list(range(DENSE.n_heads * DENSE.head_dim))


def test_dora_lies_whole_on_the_stage_of_its_layer():
    first, last = shards(DENSE, Mesh(2, 1), SIZES)
    adapter = dora("layers.1.attention.wo")
    assert not part_of_adapter(adapter, first).deltas
    part = part_of_adapter(adapter, last).deltas["layers.0.attention.wo"]  # counted from the stage's first
    assert part.magnitude.tolist() == list(range(DENSE.dim))
