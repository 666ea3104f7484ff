"""README's table of speeds says what bench/results holds."""

import json
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[2]
COLUMNS = ("decode 1", "decode 8", "decode 16", "prefill 512", "prefill 2048")
RESULTS = {
    name: json.loads((ROOT / f"bench/results/{name}.json").read_text())
    for name in ("rivals", "native-vs-transformers", "torch-vs-transformers")
}


def measured(weights: str, rival: str, column: str) -> float | None:
    """The ratio that was measured last; of transformers, from its own page where that has the column."""
    model, bits, *torch_backend = weights.replace(",", "").split(maxsplit=2)
    if rival == "transformers" and column != "prefill 2048":
        page = RESULTS["torch-vs-transformers" if torch_backend else "native-vs-transformers"]
        return page["models"][model]["speed"][column.removesuffix(" 512")]["ratio"]
    found = RESULTS["rivals"].get(f"{model} {bits} {rival} {column}")
    return None if found is None or torch_backend else median(
        theirs / ours for ours, theirs in zip(found["ours"], found["theirs"], strict=True)
    )  # fmt: skip


def rows():
    lines = (ROOT / "README.md").read_text().splitlines()
    for line in lines[lines.index("|---|---|---:|---:|---:|---:|---:|") + 1 :]:
        if not line.startswith("|"):
            return
        weights, rival, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        yield pytest.param(weights, rival, cells, id=f"{weights} {rival}")


@pytest.mark.parametrize(("weights", "rival", "cells"), list(rows()))
def test_a_row_is_what_was_measured(weights, rival, cells):
    assert len(cells) == len(COLUMNS)
    for column, cell in zip(COLUMNS, cells, strict=True):
        found = measured(weights, rival, column)
        if not cell:
            assert found is None or "torch backend" in weights or rival == "transformers"
            continue
        digits = len(cell.partition(".")[2])
        assert cell == f"{found:.{digits}f}"
