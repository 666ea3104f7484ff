"""How many tokens a request took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from maestrale.llm import Completion


def usage(prompts: Sequence[Sequence[int]], answers: Sequence[Completion] | int) -> dict[str, Any]:
    """answers: the completions, or how many tokens they have in all."""
    asked = sum(len(ids) for ids in prompts)
    said = answers if isinstance(answers, int) else sum(len(completion.token_ids) for completion in answers)
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}
