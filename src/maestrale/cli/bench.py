"""Placeholder until `maestrale bench` is written."""


def bench() -> None:
    """Measure speed."""
