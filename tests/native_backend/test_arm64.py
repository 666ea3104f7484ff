"""The kernels of another processor: cross-compiled, and run under emulation."""

import shutil
import subprocess
from pathlib import Path

import pytest

import maestrale

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
SOURCES = Path(maestrale.__file__).parent / "native_backend" / "csrc"


@pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
    reason=f"needs {COMPILER} and {EMULATOR} (Debian: g++-aarch64-linux-gnu, qemu-user)",
)
def test_the_arm64_kernels_give_the_products_and_the_attention_of_the_formulas(tmp_path):
    program = tmp_path / "check"
    files = [Path(__file__).with_name("arm64_check.cpp")]
    files += [SOURCES / f"{name}.cpp" for name in ("isa", "kernels_neon", "kernels_generic")]
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-fno-math-errno", "-fno-strict-aliasing", "-static"]
    flags += ["-fsanitize=signed-integer-overflow", "-fsanitize-undefined-trap-on-error"]  # ends the program
    subprocess.run([COMPILER, *flags, f"-I{SOURCES}", *map(str, files), "-o", str(program)], check=True)
    run = subprocess.run([EMULATOR, str(program)], capture_output=True, text=True, timeout=300, check=False)
    assert (run.returncode, run.stdout) == (0, "ok\n")
