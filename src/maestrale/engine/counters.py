"""What the engine has done and what it holds, as numbers to be shown."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PoolCounters:
    """Pages of one kind of layer. window: the kind's, None where it has none. Held ones are the rest of `total`;
    in_step: those that were held when the last step was sent, by sequences that may have ended with it."""

    window: int | None
    total: int
    free: int
    cached: int
    evictions: int
    in_step: int


@dataclass(frozen=True)
class Counters:
    """A moment's state (waiting, running: requests; sequences: those running), and sums since the engine was made.

    prefix_asked, prefix_found: tokens that admitted sequences began with, and those of them found in the cache.
    tokens_in, tokens_out: of prompts accepted, and generated. drafted, accepted: tokens of speculation.
    preemptions: how often a running request gave up its pages. failed: requests that ended with an error.
    failed_steps: steps that the backend broke off.
    """

    waiting: int
    running: int
    sequences: int
    pools: tuple[PoolCounters, ...]
    steps: int
    tokens_in: int
    tokens_out: int
    prefix_asked: int
    prefix_found: int
    drafted: int
    accepted: int
    preemptions: int
    failed: int
    failed_steps: int
