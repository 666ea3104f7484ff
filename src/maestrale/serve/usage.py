"""How many tokens a request took, and how many of its prompts' the cache held already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from maestrale.llm import Completion
from maestrale.serve.job import Job


def usage(job: Job, answers: Sequence[Completion] | int) -> dict[str, Any]:
    """job: one that has ended. answers: the completions, or how many tokens they have in all."""
    asked = sum(len(work.ids) for work in job.work)
    said = answers if isinstance(answers, int) else sum(len(completion.token_ids) for completion in answers)
    return {
        "prompt_tokens": asked,
        "completion_tokens": said,
        "total_tokens": asked + said,
        "prompt_tokens_details": {"cached_tokens": job.cached},
    }
