"""A schedule as flat arrays."""

import numpy as np
from fake_runner import make_layout

from maestrale.engine.assemble import assemble
from maestrale.engine.pages import Pages
from maestrale.engine.request import Request
from maestrale.engine.scheduler import Schedule
from maestrale.sampling.params import SamplingParams


def test_sequences_lie_end_to_end_with_their_own_positions_and_tables():
    # A worked case: 5, 7 and 2 new tokens at positions 0, 1 and 3.
    pages = Pages(make_layout(page_size=1, windows=(None, 3), max_chunk=16, max_len=20, pages=40))
    schedule, wanted = Schedule(), [range(4, 5), range(8, 8), range(3, 5)]
    for computed, count in ((0, 5), (1, 7), (3, 2)):
        prompt = [10 * count + i for i in range(computed + count)]
        request = Request(prompt, SamplingParams(), seed=0, length_limit=20, chunk=16, keep_logits=False)
        (sequence,) = request.sequences
        sequence.computed, sequence.table = computed, pages.new_table()
        pages.grant([(sequence.table, 0, len(prompt))])
        schedule.work.append((sequence, count))
    schedule.copies = [(1, 7, 8), (0, 1, 2), (1, 5, 6)]
    batch = assemble(schedule, wanted, n_kinds=2)
    assert batch.starts.tolist() == [0, 5, 12, 14]
    assert batch.positions.tolist() == [*range(5), *range(1, 8), 3, 4]
    assert batch.token_ids.tolist() == [*range(50, 55), *range(71, 78), 23, 24]
    assert batch.logit_rows.tolist() == [4, 12, 13]
    assert [copies.tolist() for copies in batch.copies] == [[[1, 2]], [[7, 8], [5, 6]]]
    for kind, table in enumerate(batch.tables):
        expected = [sequence.table.entries[kind] for sequence, _ in schedule.work]
        np.testing.assert_array_equal(table, expected)
