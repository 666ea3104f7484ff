"""`maestrale interactive`: a prompt, a reply, and again."""

from __future__ import annotations

from typing import Annotated

import typer

from maestrale.cli import options as opt
from maestrale.cli.chat import converse


def interactive(
    path: opt.Model = None,
    instruct: Annotated[
        bool, typer.Option("--instruct", help="A chat with an instruct model, not a text to go on with.")
    ] = False,
    max_tokens: opt.MaxTokens = 256,
    temperature: opt.Temperature = 0.7,
    top_k: opt.TopK = 0,
    top_p: opt.TopP = 0.95,
    min_p: opt.MinP = 0.0,
    repetition_penalty: opt.RepetitionPenalty = 1.0,
    seed: opt.Seed = None,
    dtype: opt.Dtype = "auto",
    weights: opt.Weights = "auto",
    device: opt.Device = "auto",
    backend: opt.Backend = "auto",
    threads: opt.Threads = None,
    num_pipeline_ranks: opt.PipelineRanks = None,
    tensor_parallel: opt.TensorParallel = None,
    expert_parallel: opt.ExpertParallel = 1,
    max_len: opt.MaxLen = None,
    max_batch_tokens: opt.MaxBatchTokens = None,
    ignore_unexpected: opt.IgnoreUnexpected = False,
    adapter: opt.Adapter = None,
) -> None:
    """Write a text with the model, line by line; with --instruct, talk with it, as `chat` does.

    Each line is added to the text, and the model goes on from there; an empty line lets it go on. /? lists the
    commands.
    """
    sampling = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    model = {
        "dtype": dtype,
        "weights": weights,
        "device": device,
        "backend": backend,
        "threads": threads,
        "num_pipeline_ranks": num_pipeline_ranks,
        "tensor_parallel": tensor_parallel,
        "expert_parallel": expert_parallel,
        "max_len": max_len,
        "max_batch_tokens": max_batch_tokens,
        "ignore_unexpected": ignore_unexpected,
    }
    converse(path, "chat" if instruct else "text", None, False, sampling, model, adapter)
