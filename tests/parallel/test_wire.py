"""A batch that travels between ranks arrives as it was, and one that cannot be one is refused."""

import numpy as np
import pytest

from maestrale.batch import Batch, CacheLayout
from maestrale.errors import DistributedError
from maestrale.parallel.wire import pack_batch, unpack_batch

LAYOUT = CacheLayout(4, 400, 16, (None, 7), (100, 5), (1000, 50))


def batch():
    """Two sequences, at positions 17 to 19 and 6: the first kind's tables reach their fifth page."""
    draw = np.random.default_rng(0)
    tables = tuple(draw.integers(60, size=(2, ring)) for ring in LAYOUT.rings)
    tables[0][:, 5:] = 0  # not granted yet
    return Batch(
        np.array([5, 6, 7, 8]),
        np.array([17, 18, 19, 6]),
        np.array([0, 3, 4]),
        tables,
        (np.array([[1, 2]]), np.empty((0, 2), np.int64)),
        np.array([2, 3]),
        experts=True,
        adapters=np.array([1, -1]),
    )


def test_a_batch_arrives_as_it_was_and_of_page_tables_only_what_is_reached_travels():
    sent = batch()
    flat = pack_batch(sent, LAYOUT)
    assert len(flat) < 60  # the first kind's tables alone have 200 entries
    came = unpack_batch(flat, LAYOUT)
    assert came.experts
    for name in ("token_ids", "positions", "starts", "logit_rows", "adapters", "tables", "copies"):
        pairs = [getattr(batch, name) for batch in (came, sent)]
        for ours, theirs in zip(*((x if isinstance(x, tuple) else (x,)) for x in pairs), strict=True):
            assert ours.shape == theirs.shape
            assert ours.dtype == np.int64
            assert np.array_equal(ours, theirs)


def damaged():
    flat = pack_batch(batch(), LAYOUT)
    yield "too short for a head", flat[:3]
    yield "an element is missing", flat[:-1]
    yield "one too many", np.append(flat, 0)
    for place in range(9):
        for value in (-1, 1 << 40):
            changed = flat.copy()
            changed[place] = value
            if place != 3:
                yield f"{value} in place {place}", changed


@pytest.mark.parametrize(("what", "flat"), list(damaged()))
def test_what_cannot_be_a_batch_is_refused(what, flat):
    with pytest.raises(DistributedError, match="different versions or options"):
        unpack_batch(flat, LAYOUT)
