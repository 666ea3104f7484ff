"""Runs a notebook's cells without Jupyter: `python examples/run_notebook.py examples/classifier.ipynb [--write]`.

One namespace, cells from top to bottom, what they print goes to standard output; the first error ends it. --write puts
what was printed and drawn into the notebook.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
from pathlib import Path
from typing import Any


def run(notebook: dict[str, Any]) -> dict[str, Any]:
    """Runs the code cells and leaves their outputs in them; the namespace in the end."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
        print(printed.getvalue(), end="")
        text = printed.getvalue().splitlines(keepends=True)
        cell["execution_count"] = number
        cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": text}] if text else []
        for figure in map(pyplot.figure, pyplot.get_fignums()):
            image = io.BytesIO()
            figure.savefig(image, format="png", dpi=80)
            drawn = {"image/png": base64.b64encode(image.getvalue()).decode()}
            cell["outputs"].append({"output_type": "display_data", "data": drawn, "metadata": {}})
        pyplot.close("all")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    notebook = json.loads(chosen.notebook.read_text(encoding="utf-8"))
    run(notebook)
    if chosen.write:
        chosen.notebook.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
