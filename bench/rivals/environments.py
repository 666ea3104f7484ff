"""A Python environment for each rival: `python bench/rivals/environments.py [RIVAL …]`.

They lie in bench/rivals/.envs/RIVAL, with what requirements-RIVAL.txt pins; llama.cpp is compiled for this processor,
which takes a C++ compiler and about 15 minutes on two cores. Where torch is asked for, the index of its builds for
processors saves gigabytes: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu. All together take about 7 GB.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
COMPILE = "-DGGML_NATIVE=ON -DGGML_BLAS=OFF -DGGML_OPENMP=ON -DGGML_LLAMAFILE=ON -DGGML_CPU_REPACK=ON"


def make_environment(requirements: Path, folder: Path) -> None:
    """A virtual environment with the packages of the file; nothing if it is whole already."""
    whole = folder / "whole"
    wanted = requirements.read_text()
    if whole.exists() and whole.read_text() == wanted:
        return
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    words: list[str | Path] = [folder / "bin" / "python", "-m", "pip", "install", "--requirement", requirements]
    subprocess.run(words, check=True, env=os.environ | {"CMAKE_ARGS": COMPILE})
    whole.write_text(wanted)


def main() -> None:
    files = {path.stem.removeprefix("requirements-"): path for path in sorted(HERE.glob("requirements-*.txt"))}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rivals", nargs="*", metavar="RIVAL", help=f"some of {', '.join(files)}; default: all")
    parser.add_argument("--into", type=Path, default=HERE / ".envs")
    chosen = parser.parse_args()
    if unknown := set(chosen.rivals) - set(files):
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(files)}")
    failed = []
    for name in chosen.rivals or files:
        try:
            make_environment(files[name], chosen.into / name)
        except subprocess.CalledProcessError as error:  # the others are worth having
            failed.append(f"{name}: {error}")
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
