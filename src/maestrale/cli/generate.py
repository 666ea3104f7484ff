"""`maestrale generate`: continue prompts."""

from __future__ import annotations

import json as jsonlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from maestrale.cli import options as opt
from maestrale.cli.declare import Option
from maestrale.cli.writing import for_output
from maestrale.errors import UsageError

if TYPE_CHECKING:
    from maestrale.llm import Completion
    from maestrale.sampling.constraint import Constraint
    from maestrale.sampling.params import SamplingParams

SEPARATOR = "====================="


def generate(
    sampling: opt.Sampling,
    model: opt.Writing,
    path: opt.Model = None,
    prompt: Annotated[list[str] | None, Option("--prompt", "-p", help="A prompt; may be given again.")] = None,
    prompts: Annotated[
        Path | None,
        Option(help="A file with a prompt a line (.jsonl: JSON strings); - is standard input."),
    ] = None,
    max_tokens: opt.MaxTokens = 128,
    presence_penalty: Annotated[
        float,
        Option(help="Taken off the logit of each token generated already.", group=opt.SAMPLING),
    ] = 0.0,
    frequency_penalty: Annotated[
        float, Option(help="The same, once for each time it was generated.", group=opt.SAMPLING)
    ] = 0.0,
    beam_width: Annotated[int, Option(help="Above 1: beam search of that width.", group=opt.SAMPLING)] = 1,
    length_penalty: Annotated[float, Option(help="Beam search: above 0 favours long text.", group=opt.SAMPLING)] = 1.0,
    n: Annotated[int, Option("--n", "-n", help="Continuations of each prompt.")] = 1,
    stop: Annotated[list[str] | None, Option(help="End before this text; may be given again.")] = None,
    min_tokens: Annotated[int, Option(help="No end before so many tokens.")] = 0,
    ignore_eos: Annotated[bool, Option("--ignore-eos", help="Go on after an end-of-sequence token.")] = False,
    json_schema: Annotated[
        Path | None,
        Option(help="A file with a JSON schema that the continuation keeps to."),
    ] = None,
    regex: Annotated[str | None, Option(help="A regular expression that it matches as a whole.")] = None,
    grammar: Annotated[Path | None, Option(help="A file with a Lark grammar that it keeps to.")] = None,
    logprobs: Annotated[
        int | None,
        Option(help="With --json: logprobs, and those of so many alternatives, 0 to 20."),
    ] = None,
    prompt_logprobs: Annotated[int | None, Option(help="The same for the prompt.")] = None,
    adapter: opt.Adapter = None,
    json: opt.Json = False,
) -> None:
    """Continue prompts, all in one batch. One prompt is streamed; several are printed in order.

    With --json: one object a line with prompt, text, token_ids, finish_reason and logprobs.
    """
    from maestrale.sampling.params import SamplingParams

    texts = [*(prompt or []), *(read_prompts(prompts) if prompts else [])]
    if not texts:
        raise UsageError("no prompt: give one with -p TEXT, or many with --prompts FILE")
    params = SamplingParams(
        max_tokens=max_tokens,
        **vars(sampling),
        stop=stop or (),
        n=n,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        min_tokens=min_tokens,
        ignore_eos=ignore_eos,
        beam_width=beam_width,
        length_penalty=length_penalty,
        constraint=_constraint(json_schema, regex, grammar),
    )
    llm = model.open(path, adapters={"adapter": adapter} if adapter else None)
    name = "adapter" if adapter else None
    if len(texts) == 1 and n == 1 and not json:
        before = texts[0]  # shown with the first piece: a prompt that is refused is not shown
        try:
            for piece in llm.stream(texts[0], params, adapter=name):
                print(for_output(before + piece.text), end="", flush=True)
                before = ""
        finally:
            if not before:
                print()
        _tell_cut(params, [piece.finish_reason])
        return
    with opt.progress_line("generating") as progress:
        completions = llm.generate(texts, params, adapter=name, progress=progress)
    for i, completion in enumerate(completions):
        if json:
            print(jsonlib.dumps(as_json(texts[i // n], completion), ensure_ascii=False))
        else:
            print(for_output(texts[i // n] + completion.text))
            print(SEPARATOR)
    _tell_cut(params, [completion.finish_reason for completion in completions])


def _tell_cut(params: SamplingParams, reasons: list[str | None]) -> None:
    """Of a text that was to be whole by some rule, and is not."""
    if params.constraint is not None and (cut := reasons.count("length")):
        which = "the text is" if len(reasons) == 1 else f"{cut} of {len(reasons)} texts are"
        print(f"maestrale: {which} cut off at --max-tokens {params.max_tokens}, so not whole", file=sys.stderr)


def _constraint(json_schema: Path | None, regex: str | None, grammar: Path | None) -> Constraint | None:
    from maestrale.sampling.constraint import read_constraint

    given: list[tuple[str, str, Any]] = []  # what an error names, kind, words
    if json_schema is not None:
        given.append((str(json_schema), "json_schema", opt.read_text(json_schema)))
    if regex is not None:
        given.append(("--regex", "regex", regex))
    if grammar is not None:
        given.append((str(grammar), "grammar", opt.read_text(grammar)))
    if len(given) > 1:
        raise UsageError("expected at most one of --json-schema, --regex and --grammar")
    return read_constraint({given[0][1]: given[0][2]}, given[0][0]) if given else None


def as_json(prompt: str, completion: Completion) -> dict[str, Any]:
    """What a program reads of a completion; what was not asked for is left out, but logprobs, which may be null."""
    fields = {name: value for name, value in asdict(completion).items() if value is not None or name == "logprobs"}
    return {"prompt": prompt, **fields}


def read_prompts(path: Path) -> list[str]:
    """A prompt a line; empty lines are left out. In a .jsonl file a line is a JSON string or {"prompt": …}."""
    content = opt.read_text(path)
    lines = [(i, line.removesuffix("\r")) for i, line in enumerate(content.split("\n"), 1) if line.strip()]
    if path.suffix != ".jsonl":
        return [line for _, line in lines]
    texts = []
    for number, line in lines:
        try:
            value = jsonlib.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}:{number}: not JSON: {error}") from None
        text = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise UsageError(f'{path}:{number}: expected a JSON string or an object with "prompt", got {line[:80]}')
        texts.append(text)
    return texts
