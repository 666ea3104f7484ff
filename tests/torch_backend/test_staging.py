"""Copies through two buffers: every byte once, whatever the sizes."""

import pytest
import torch

from maestrale.torch_backend.staging import Staging


@pytest.mark.parametrize("shape", [(), (1,), (0,), (4,), (3, 5), (8, 2), (1001,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_tensors_arrive_whole_through_buffers_smaller_than_they_are(shape, dtype):
    staging = Staging(torch.device("cuda" if torch.cuda.is_available() else "cpu"), size=16)
    for _ in range(2):
        source = torch.randint(0, 200, shape).to(dtype)
        copy = staging.copy(source)
        expected = source.clone()
        source.zero_()
        assert copy.dtype == dtype
        assert torch.equal(copy.cpu(), expected)
