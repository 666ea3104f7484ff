"""Sets of tokens laid on logits, beside plain loops over them."""

import numpy as np
import pytest

from maestrale.sampling.mask import Mask


@pytest.mark.parametrize("vocab_size", [1, 8, 300, 4099])
@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 0.89, 0.97, 1.0])
def test_what_survives_is_what_the_bits_name(vocab_size, share):
    draw = np.random.default_rng(7)
    among = [bool(one) for one in draw.random(vocab_size) < share]
    row = draw.standard_normal(vocab_size).astype(np.float32)
    before = row.tolist()
    bits = sum(1 << i for i, one in enumerate(among) if one).to_bytes(-(-vocab_size // 8), "little")
    mask = Mask(bits, vocab_size)
    assert bool(mask) == any(among)
    assert [token in mask for token in range(vocab_size)] == among
    for _ in range(2):  # again and again
        tokens, logits = mask.survivors(row)
        tokens = range(vocab_size) if tokens is None else tokens.tolist()
        found = {i: x for i, x in zip(tokens, logits.tolist(), strict=True) if x != -np.inf}
        assert found == {i: before[i] for i in range(vocab_size) if among[i]}
        assert row.tolist() == before
