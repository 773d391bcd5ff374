"""Prompt sets: reading, checking, splitting without leakage, the starter prompts and the named benchmarks and jailbreaks."""

from elsteer.prompts.attack_table import FAMILIES, AttackFamily
from elsteer.prompts.attacks import attacked, under_attack, with_attacks
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
from elsteer.prompts.suite_table import SUITES, Suite
from elsteer.prompts.suites import check_apart, load_suite, suite_name

__all__ = [
    "FAMILIES",
    "MAX_CHARS",
    "SUITES",
    "AttackFamily",
    "Prompt",
    "Suite",
    "attacked",
    "check_apart",
    "deduplicate",
    "group_near_duplicates",
    "load_starter",
    "load_suite",
    "normalise",
    "read_prompts",
    "require_both_classes",
    "sample",
    "split_prompts",
    "suite_name",
    "under_attack",
    "with_attacks",
    "without_near_duplicates",
]
