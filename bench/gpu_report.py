"""What bench/gpu.py finds: a line as it comes, and a file that keeps the latest of each part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from maestrale.checkpoint.writer import atomic_file


class Report:
    """facts: of the machine. path: where the parts are kept, those of earlier runs too; None keeps nothing."""

    def __init__(self, facts: dict[str, Any], path: Path | None):
        kept = json.loads(path.read_text())["parts"] if path is not None and path.exists() else {}
        self.facts, self.path, self.parts = facts, path, kept
        self.rows: list[dict[str, Any]] = []

    def begin(self, part: str) -> None:
        self.rows = []
        self.parts[part] = {**self.facts, "rows": self.rows}
        print(f"\n{part}", flush=True)

    def end(self, part: str, seconds: float, error: str | None = None) -> None:
        """error: why it broke off; the rows before it stand."""
        self.parts[part] |= {"seconds": seconds} | ({} if error is None else {"error": error})
        print(f"{part}: {seconds:.0f} s" + ("" if error is None else f", broken off: {error}"), flush=True)
        if self.path is not None:
            with atomic_file(self.path) as partial:
                partial.write_text(json.dumps({"parts": self.parts}, indent=1) + "\n")

    def value(self, part: str, what: str) -> float | None:
        """Of a row found before, in an earlier run too."""
        rows = self.parts.get(part, {}).get("rows", [])
        return next((row["value"] for row in rows if row["what"] == what), None)

    def add(
        self,
        what: str,
        value: float,
        unit: str,
        limit: float | None = None,
        least: float | None = None,
        most: float | None = None,
    ) -> None:
        """least, most: the goal, of the share of the limit, or of the value where there is none."""
        share = None if limit is None else value / limit
        judged = value if share is None else share
        row: dict[str, Any] = {"what": what, "value": value, "unit": unit, "limit": limit, "share": share}
        said = ""
        if least is not None or most is not None:
            met = judged >= least if least is not None else judged <= (most or 0)
            goal = f">= {least:g}" if least is not None else f"<= {most:g}"
            row |= {"goal": goal, "met": met}
            said = f"{goal}  {'met' if met else 'MISSED'}"
        self.rows.append(row)
        beside = "" if limit is None else f"limit {_number(limit)}   {judged:7.1%}"
        print(f"  {what:58} {_number(value)} {unit:9} {beside:35} {said}", flush=True)


def _number(value: float) -> str:
    return f"{value:14,.1f}" if value >= 100 else f"{value:14.5f}"
