"""Every option once. The command line, YAML files and Python read the same classes."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["CollectSettings", "FitSettings", "TrainingSettings", "TuningSettings"]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CollectSettings(_Settings):
    """Answering the prompts and capturing states."""

    system: str | None = Field(None, description="System prompt put before every chat.")
    thinking: bool | None = Field(None, description="Thinking mode, for chat templates that have one.")
    batch_size: int = Field(32, ge=1, description="Prompts answered at a time.")
    max_new_tokens: int = Field(48, ge=4, description="Tokens of an answer that the judge sees at most.")
    state_tokens: int = Field(2, ge=1, description="States per prompt: its last token and the first generated ones.")
    judge: str = Field("rules", description="Who says whether an answer refuses.")


class TrainingSettings(_Settings):
    """Training the energy models."""

    width: int = Field(128, ge=4, description="Width r of the first, linear operation of the energy model.")
    hidden: tuple[int, ...] = Field((64,), description="Widths of the hidden layers after it.")
    layer_norm: bool = Field(True, description="LayerNorm after the first operation.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout while training, never while steering.")
    temperature: float = Field(0.5, gt=0, description="Temperature of InfoNCE.")
    across: float = Field(0.25, ge=0, le=1, description="Weight of negatives of the other kind of prompt.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(0.05, ge=0, description="Weight decay of AdamW.")
    batch_per_outcome: int = Field(32, ge=2, description="States of each of the four outcomes in a batch.")
    epochs: int = Field(40, ge=1, description="Epochs at most.")
    patience: int = Field(
        12, ge=1, description="Epochs without a better validation AUROC in any layer before stopping."
    )
    validation_share: float = Field(0.2, gt=0, lt=1, description="Share of the prompts that validate.")


class TuningSettings(_Settings):
    """placeholder"""


class FitSettings(_Settings):
    """placeholder"""
