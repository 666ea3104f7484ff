"""Which kernels run where, and what is said when they cannot."""

import pytest
import torch

from maestrale.errors import UsageError
from maestrale.torch_backend.triton import choose
from maestrale.torch_backend.triton.choose import choose_kernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_no_device_gets_triton_unasked_before_it_has_been_checked_on_a_gpu(device, monkeypatch):
    monkeypatch.delenv("MAESTRALE_KERNELS", raising=False)
    monkeypatch.setattr(choose, "find_spec", lambda name: object())
    assert choose_kernels(device) == "torch"


def test_the_environment_may_choose(monkeypatch):
    monkeypatch.setattr(choose, "find_spec", lambda name: object())
    monkeypatch.setenv("MAESTRALE_KERNELS", "torch")
    assert choose_kernels(CUDA) == "torch"
    monkeypatch.setenv("MAESTRALE_KERNELS", "triton")
    assert choose_kernels(CUDA) == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_kernels(CPU) == "triton"


@pytest.mark.parametrize(
    ("asked", "interpret", "installed", "said"),
    [
        ("cuda", "1", True, "MAESTRALE_KERNELS='cuda': expected torch or triton"),
        ("triton", "1", False, "pip install triton"),
        ("triton", "0", True, "TRITON_INTERPRET=1"),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(asked, interpret, installed, said, monkeypatch):
    monkeypatch.setenv("MAESTRALE_KERNELS", asked)
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    monkeypatch.setattr(choose, "find_spec", lambda name: object() if installed else None)
    with pytest.raises(UsageError, match=said):
        choose_kernels(CPU)
