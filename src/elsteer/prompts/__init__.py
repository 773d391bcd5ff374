"""Prompt sets: reading, checking, splitting without leakage, the starter prompts and the named benchmarks."""

from elsteer.prompts.prompt import Prompt

__all__ = ["Prompt"]
