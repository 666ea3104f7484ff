"""Run, serve and train Mistral and Mixtral models."""

from __future__ import annotations

TYPE_CHECKING = False  # type checkers read it as true; `typing` takes longer to import than the rest of the package
if TYPE_CHECKING:
    from maestrale.llm import LLM, Completion
    from maestrale.sampling.params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "SamplingParams"]


def __getattr__(name: str) -> object:
    """Import on first use: `import maestrale` alone stays light (PEP 562)."""
    if name == "SamplingParams":
        from maestrale.sampling.params import SamplingParams

        return SamplingParams
    if name in ("LLM", "Completion"):
        from maestrale import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'maestrale' has no attribute {name!r}")
