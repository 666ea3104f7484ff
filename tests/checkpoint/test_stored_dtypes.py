import numpy as np
import pytest

from maestrale.checkpoint.dtypes import StoredTensor, cast, is_finite
from maestrale.errors import CheckpointError

torch = pytest.importorskip("torch")
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def stored(values: torch.Tensor, dtype: str) -> StoredTensor:
    return StoredTensor(dtype, tuple(values.shape), values.contiguous().view(torch.uint8).numpy().reshape(-1))


def every_pattern(dtype: str) -> torch.Tensor:
    if dtype != "F32":
        return torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(TORCH[dtype])
    bits = np.random.default_rng(0).integers(0, 1 << 32, 100_000, np.uint32)
    halfway = (np.arange(1 << 16, dtype=np.uint32) << 16) + np.uint32(0x8000)  # ties between two bfloat16
    special = np.array([0x7F800001, 0xFF800001, 0x7F7FFFFF, 0x7F80FFFF, 0x80000000, 1], np.uint32)
    return torch.from_numpy(np.concatenate([bits, halfway, special]).view(np.float32))


@pytest.mark.parametrize("source", TORCH)
@pytest.mark.parametrize("target", TORCH)
def test_cast_rounds_every_pattern_as_torch_does_and_keeps_nan(source, target):
    values = every_pattern(source)
    found = torch.from_numpy(cast(stored(values, source), target).data).view(TORCH[target])
    expected = values.to(TORCH[target])
    nan = values.isnan()
    assert found[nan].isnan().all()
    assert torch.equal(found[~nan].view(torch.uint8), expected[~nan].view(torch.uint8))


@pytest.mark.parametrize("dtype", TORCH)
def test_finite_means_neither_nan_nor_inf(dtype):
    values = every_pattern(dtype)
    finite = values[values.isfinite()]
    assert is_finite(stored(finite, dtype))
    for strange in (float("nan"), float("inf"), float("-inf")):
        assert not is_finite(stored(torch.cat([finite, torch.tensor([strange], dtype=TORCH[dtype])]), dtype))


def test_a_cast_keeps_the_shape_and_a_needless_one_keeps_the_tensor():
    tensor = stored(torch.randn(3, 5), "F32")
    assert cast(tensor, "BF16").shape == (3, 5)
    assert cast(tensor, "BF16").array.dtype == np.uint16
    assert cast(tensor, "F32") is tensor


@pytest.mark.parametrize("use", [is_finite, lambda t: cast(t, "BF16")])
def test_other_dtypes_are_refused_by_name(use, refused):
    with refused(CheckpointError, 3, "F8_E4M3", "BF16, F16, F32"):
        use(StoredTensor("F8_E4M3", (4,), np.zeros(4, np.uint8)))
