"""Prompt sets: reading, checking, splitting without leakage, the starter prompts and the named benchmarks."""

from elsteer.prompts.prompt import Prompt
from elsteer.prompts.read import MAX_CHARS, read_prompts
from elsteer.prompts.split import (
    deduplicate,
    group_near_duplicates,
    normalise,
    require_both_classes,
    sample,
    split_prompts,
    without_near_duplicates,
)
from elsteer.prompts.starter import load_starter
from elsteer.prompts.suites import SUITES, Suite, load_suite

__all__ = [
    "MAX_CHARS",
    "SUITES",
    "Prompt",
    "Suite",
    "deduplicate",
    "group_near_duplicates",
    "load_starter",
    "load_suite",
    "normalise",
    "read_prompts",
    "require_both_classes",
    "sample",
    "split_prompts",
    "without_near_duplicates",
]
