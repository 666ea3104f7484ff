"""A checkpoint's tensors into the model's parameters, without a second copy of the weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from maestrale.checkpoint.dtypes import StoredTensor
from maestrale.checkpoint.reader import Checkpoint
from maestrale.torch_backend.model import Transformer
from maestrale.torch_backend.staging import Staging

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def load_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
    keep: Callable[[str], nn.Module | None] = lambda name: None,
) -> Transformer:
    """The model in evaluation mode, frozen. `progress` is called with (tensors done, tensors in all).

    keep: makes the layer of a canonical weight that is to take fewer bits than `dtype` has, and gives None for others.

    On the CPU a tensor that is stored as it is wanted is used where it lies, mapped from the file; any other is
    copied and its mapped pages are given back at once, so that at no time more than one tensor exists twice.
    """
    with torch.device("meta"):
        model = Transformer(checkpoint.config)
    names, state = checkpoint.names(), {}
    staging = Staging(device) if device.type == "cuda" else None
    for done, name in enumerate(names):
        if (layer := keep(name)) is not None:
            model.set_submodule(name.removesuffix(".weight"), layer)
        else:
            stored = as_torch(checkpoint.tensor(name))
            state[name] = (stored if staging is None else staging.copy(stored)).to(device=device, dtype=dtype)
        checkpoint.release(name)  # costs a tensor that stays mapped nothing: none of its pages has been read yet
        progress(done + 1, len(names))
    checkpoint.verify_unchanged()
    if checkpoint.config.tied_embeddings:
        state["output.weight"] = state["tok_embeddings.weight"]
    model.load_state_dict(state, assign=True)
    if checkpoint.config.tied_embeddings:
        model.output.weight = model.tok_embeddings.weight  # one parameter, not two on the same memory
    return model.requires_grad_(False).eval()


def as_torch(tensor: StoredTensor) -> torch.Tensor:
    """A view of a stored tensor's bytes."""
    return torch.from_numpy(tensor.data).view(DTYPES[tensor.dtype]).view(tensor.shape)
