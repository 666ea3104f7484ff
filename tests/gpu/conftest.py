"""Triton's kernels on a GPU where there is one, else by Triton's interpreter on the CPU."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs programs one after another: a few splits show as much as 32, and a few wide products."""
    modules = __import__("sys").modules
    if not torch.cuda.is_available() and "maestrale.torch_backend.triton.tiles" in modules:
        monkeypatch.setattr("maestrale.torch_backend.triton.tiles._PROGRAMS", 24)
    if not torch.cuda.is_available() and "maestrale.torch_backend.triton.few" in modules:
        monkeypatch.setattr("maestrale.torch_backend.triton.few._OUT", 64)
