"""`Prompt`: a chat plus what the right answer to it is."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Prompt"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A chat (messages) plus whether the right answer to it is a refusal.

    messages: the chat, oldest first, each {"role": "system" | "user" | "assistant", "content": str}; the last is the user's.
    harmful: True if the right answer is a refusal, False if it is help.
    source, category: where it comes from and what kind it is, for tables; family: prompts of one family (variants of one
    idea) never stand in two splits.
    """

    messages: tuple[dict[str, str], ...]
    harmful: bool
    source: str = ""
    category: str = ""
    family: str = ""
    id: str = field(default="")

    def __post_init__(self) -> None:
        if not self.id:
            digest = hashlib.sha256(json.dumps([list(self.messages), self.harmful]).encode()).hexdigest()
            object.__setattr__(self, "id", digest[:16])

    @classmethod
    def of(cls, text: str, harmful: bool, **rest: str) -> Prompt:
        """A chat of one user message."""
        return cls(messages=({"role": "user", "content": text},), harmful=harmful, **rest)

    @property
    def text(self) -> str:
        """The last message, which the model answers."""
        return self.messages[-1]["content"]

    def to_row(self) -> dict[str, Any]:
        """As a JSON object, the form of prompts.jsonl."""
        return {
            "id": self.id,
            "messages": list(self.messages),
            "harmful": self.harmful,
            "source": self.source,
            "category": self.category,
            "family": self.family,
        }

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Prompt:
        """The inverse of `to_row`."""
        return cls(**{**row, "messages": tuple(row["messages"])})
