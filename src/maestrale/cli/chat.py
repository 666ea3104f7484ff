"""`maestrale chat`: talk with a model at the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from maestrale.cli import options as opt
from maestrale.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

FORMS = ("auto", "chat", "text")


def chat(
    path: opt.Model = None,
    system: Annotated[str | None, typer.Option(help="A system message.", show_default=False)] = None,
    form: Annotated[
        str, typer.Option(help="chat: messages in turns; text: one text that you and the model write; or auto.")
    ] = "auto",
    plain: Annotated[bool, typer.Option("--plain", help="Show replies as they are written, no Markdown.")] = False,
    max_tokens: opt.MaxTokens = 1024,
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
    """Talk with a model. /? lists the commands, Ctrl-C stops a reply, Ctrl-D leaves.

    A model that has not learnt to chat, as the bundled ones, goes on with your text instead.
    """
    converse(
        path,
        form,
        system,
        plain,
        {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
        },
        {
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
        },
        adapter,
    )


def converse(
    path: Path | None,
    form: str,
    system: str | None,
    plain: bool,
    sampling: Mapping[str, Any],
    model: Mapping[str, Any],
    adapter: Path | None = None,
) -> None:
    """Opens the model and talks. sampling: fields of SamplingParams. model: arguments of LLM."""
    if form not in FORMS:
        raise UsageError(f"--form {form}: expected one of {', '.join(FORMS)}")
    from maestrale.cli.conversation import Chat, Conversation, Text
    from maestrale.cli.session import Session
    from maestrale.sampling.params import SamplingParams

    params = SamplingParams(**sampling)  # a wrong value is refused before a weight is read
    adapters = {"adapter": adapter} if adapter else None
    llm = opt.open_llm(path, **model, adapters=adapters)
    params = SamplingParams(**sampling, experts=llm.config.moe is not None)
    name = path.resolve().name if path else "stories"
    conversation: Conversation
    if form == "chat" or (form == "auto" and llm.tokenizer.chats):
        llm.tokenizer.encode_chat([{"role": "user", "content": ""}])  # a tokenizer without a chat form is told now
        conversation = Chat(llm.tokenizer)
        conversation.system = system or ""
    else:
        if system:
            raise UsageError(
                f"--system: {name} goes on with a text, which has no system message; --form chat forces one"
            )
        if form == "auto":
            print(
                f"{name} has not learnt to chat: it goes on with your text; an empty line lets it go on",
                file=sys.stderr,
            )
        conversation = Text(llm.tokenizer)
    Session(llm, name, conversation, params, plain, "adapter" if adapter else None).run()
