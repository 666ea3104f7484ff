"""GPTQ against its own definition, and on the bundled model."""

import numpy as np
import pytest
import torch
from tiny import DENSE, MIXTURE, make_folder, tokens

from maestrale.checkpoint.dtypes import StoredTensor
from maestrale.checkpoint.packed import dequantize
from maestrale.checkpoint.quantize import Recipe, quantize
from maestrale.checkpoint.reader import open_checkpoint
from maestrale.checkpoint.rounding import round_to_nearest
from maestrale.errors import UsageError
from maestrale.torch_backend.gptq import Calibrated, round_gptq


def drawn(n, k, seed=0):
    """A weight [n, k], and the Hessian of inputs that lie mostly in k / 4 directions."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * k, k // 4)) @ rng.standard_normal((k // 4, k)) + 0.1 * rng.standard_normal((4 * k, k))
    return rng.standard_normal((n, k)).astype(np.float32), torch.from_numpy(2 * x.T @ x)


def output_error(values, weight, hessian):
    difference = (dequantize(weight) - values).astype(np.float64)
    return np.einsum("nk,kl,nl->", difference, hessian.numpy() / 2, difference)


@pytest.mark.parametrize(("format", "group"), [("int4", 32), ("int4", 128), ("int8", 0)])
def test_the_layers_output_error_is_far_below_that_of_rounding_to_nearest(format, group):
    values, hessian = drawn(24, 256)
    plain = round_to_nearest("w", StoredTensor.from_array(values, "F32"), format, group or 32)
    found = round_gptq(values, hessian, format, group)
    assert (found.format, found.group, found.shape) == (plain.format, plain.group, plain.shape)
    assert output_error(values, found, hessian) < 0.5 * output_error(values, plain, hessian)


@pytest.mark.parametrize(("format", "group"), [("int4", 32), ("int8", 0)])
def test_inputs_that_are_independent_are_rounded_to_nearest(format, group):
    values, _ = drawn(20, 96)
    plain = round_to_nearest("w", StoredTensor.from_array(values, "F32"), format, 32)
    for hessian in (torch.eye(96, dtype=torch.float64), torch.zeros(())):
        found = dequantize(round_gptq(values, hessian, format, group))
        # A value in the middle between two steps may go either way.
        close = np.isclose(found, dequantize(plain), atol=1e-6)
        assert close.mean() > 0.999


def test_each_codes_error_is_taken_back_by_the_inputs_after_it():
    """The textbook recursion, an input at a time in float64 with the Hessian's inverse shrunk at each step."""
    values, hessian = drawn(5, 32, seed=3)
    hessian += 300 * torch.eye(32)  # so that float32 and float64 seldom round to different sides
    found = round_gptq(values, hessian, "int8", 0)
    w, h = values.astype(np.float64), hessian.numpy() + 0.01 * hessian.diagonal().mean().item() * np.eye(32)
    scales, left = np.abs(values).max(axis=1) / np.float32(127), list(range(32))
    expected = np.zeros_like(w)
    for i in range(32):
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        expected[:, i] = np.clip(np.rint(w[:, i] / scales), -127, 127)
        error = (w[:, i] - expected[:, i] * scales) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0]
        left.pop(0)
    different = np.rint(dequantize(found) / scales[:, None]) != expected
    assert different.mean() < 0.02
    plain = dequantize(round_to_nearest("w", StoredTensor.from_array(values, "F32"), "int8"))
    assert (np.rint(plain / scales[:, None]) != expected).mean() > 0.05


@pytest.mark.parametrize("config", [DENSE, MIXTURE])
def test_a_calibrated_folder_is_closer_to_the_model_on_the_texts_kind(tmp_path, config):
    """Output error of the last layer's inputs is what is minimised; here it is seen in the logits."""
    from maestrale import LLM

    source = make_folder(tmp_path / "source", config)
    ids = tokens(9000)
    with open_checkpoint(source) as checkpoint:
        quantize(source, tmp_path / "gptq", Recipe("int4"), Calibrated(checkpoint, ids, 1))
    quantize(source, tmp_path / "nearest", Recipe("int4"), round_to_nearest)
    held_out = [1, *tokens(200, seed=9)]
    logits = {
        name: LLM(tmp_path / name, dtype="float32").logits([held_out])[0] for name in ("source", "gptq", "nearest")
    }
    errors = {name: np.square(logits[name] - logits["source"]).mean() for name in ("gptq", "nearest")}
    assert errors["gptq"] < 0.9 * errors["nearest"]


def test_too_short_a_text_is_refused(tmp_path):
    source = make_folder(tmp_path / "source", DENSE)
    with open_checkpoint(source) as checkpoint, pytest.raises(UsageError, match="has 100 tokens; expected at least"):
        Calibrated(checkpoint, tokens(100), 1)
