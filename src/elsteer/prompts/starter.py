"""The starter prompts: chats of our own writing (CC0) that let a first landscape be fitted without any download."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any, Literal, get_args

from elsteer.errors import PromptError
from elsteer.prompts.prompt import Prompt

__all__ = ["STARTER_SPLITS", "StarterSplit", "load_starter", "shipped_rows"]

StarterSplit = Literal["train", "dev", "test"]
STARTER_SPLITS: tuple[StarterSplit, ...] = get_args(StarterSplit)


def load_starter(split: str | None = None) -> list[Prompt]:
    """The starter prompts of one split, or of all three in the order train, dev, test.

    Every prompt is one user message with source "starter". `category` is one of ten kinds of benign prompts that sound
    harmful, "plain" for plainly benign ones, or one of eight hazards for harmful ones. `family` joins a benign prompt
    with its harmful twin in like words; a family stands in one split only, so what is fitted on
    `train` and tuned on `dev` can be measured on `test`.

    Raises PromptError if `split` is none of "train", "dev" and "test".
    """
    if split is not None and split not in STARTER_SPLITS:
        raise PromptError(
            f"The starter prompts have no split '{split}': choose one of {', '.join(STARTER_SPLITS)}, or none for all."
        )
    prompts: list[Prompt] = []
    for name in STARTER_SPLITS if split is None else (split,):
        for row in shipped_rows(name):
            prompts.append(
                Prompt.of(
                    row["prompt"],
                    harmful=row["harmful"],
                    source="starter",
                    category=row["category"],
                    family=row["family"],
                )
            )
    return prompts


def shipped_rows(name: str) -> list[dict[str, Any]]:
    """Rows of the file `name`.jsonl that comes with this package."""
    text = resources.files("elsteer.prompts").joinpath("data", f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
