"""Every option once. The command line, YAML files and Python read the same classes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator

from elsteer.errors import RunError

__all__ = ["CollectSettings", "FitSettings", "TrainingSettings", "TuningSettings"]

# Of TuningSettings: what says which settings are tried and taken.
_WHICH_ARE_TRIED = {"etas", "band_share", "bands", "steps", "windows", "gates", "guards", "finalists", "least_removed"}
_IN_THE_KEY = {"quality_prompts"}  # of the trials that rest on it, those of quality

_Share = Annotated[float, Field(ge=0, le=1)]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class CollectSettings(_Settings):
    """Answering the prompts and capturing states."""

    system: str | None = Field(None, description="System prompt put before every chat.")
    thinking: bool | None = Field(None, description="Thinking mode, for chat templates that have one.")
    batch_size: int = Field(64, ge=1, description="Prompts answered at a time.")
    max_new_tokens: int = Field(48, ge=4, description="Tokens of an answer that the judge sees at most.")
    full_answers: int = Field(
        600,
        ge=16,
        description="Training prompts answered in full at most; of the others one token, which mostly tells the verdict.",
    )
    state_tokens: int = Field(1, ge=1, description="States per prompt: its last token and the first generated ones.")
    judge: str = Field("rules", description="Who says whether an answer refuses.")


class TrainingSettings(_Settings):
    """Training the energy models."""

    energy: str = Field(
        "product",
        pattern="^(product|network)$",
        description="Form of the energy: product (is refusing due, times does it refuse) or network (trained by InfoNCE).",
    )
    ridge: float = Field(0.01, gt=0, description="L2 penalty of the product energy's regression.")
    refine_epochs: int = Field(2, ge=0, description="Product: epochs of training through the model; 0: none.")
    refine_rate: float = Field(1e-3, gt=0, description="Peak learning rate of training through the model.")
    refine_stay: float = Field(
        0.1, ge=0, description="Weight of staying as it is where the model is right, in training through the model."
    )
    refine_band: tuple[_Share, _Share] = Field(
        (0.5, 0.92), description="Blocks that are trained through the model, from and up to, as shares of the depth."
    )
    refine_units: int = Field(
        64, ge=0, description="Hidden units that training through the model gives to whether refusing is due."
    )
    refine_sharpness: float = Field(
        1.0,
        ge=0,
        description="Product: how sharply a step ends where the model does what is due already; 0: it does not.",
    )
    refine_still: float = Field(
        0.1, ge=0, description="Weight of not moving where the model is right, in training through the model."
    )
    refine_gain: float = Field(
        2.0,
        gt=0,
        description="Product: u (is refusing due) times this once it is trained, so that a step is firmer in doubt.",
    )
    refine_pooled: bool = Field(
        True,
        description="Product: a step goes by the mean of u (is refusing due) over the steered blocks up to its own.",
    )
    refine_due: bool = Field(
        False,
        description="Let training through the model change what tells whether refusing is due, beyond its offset.",
    )
    context_blocks: int = Field(
        4,
        ge=0,
        description="Product: blocks before the steered ones whose values of the prompt's tokens are read too; 0: none.",
    )
    context_heads: int = Field(8, ge=1, description="Product: queries by which they are read.")
    refine_prompts: int = Field(
        10_000,
        ge=16,
        description="Training prompts that training through the model sees at most; the readers are fitted on all of them.",
    )
    refine_memory: int = Field(
        6 << 30,
        gt=0,
        description="Bytes of prompt caches for it (on disk for a model on the CPU); of more prompts a sample is trained on.",
    )
    width: int = Field(128, ge=4, description="Network: width r of its first, linear operation.")
    hidden: tuple[int, ...] = Field((64,), description="Network: widths of the hidden layers after it.")
    layer_norm: bool = Field(True, description="Network: LayerNorm after the first operation.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Network: dropout while training, never while steering.")
    temperature: float = Field(0.5, gt=0, description="Network: temperature of InfoNCE.")
    across: float = Field(0.25, ge=0, le=1, description="Network: weight of negatives of the other kind of prompt.")
    counterpart: float = Field(
        3.0,
        ge=0,
        description="Network: how far the counterpart of a state lies, in mean differences of the outcomes of its kind; 0: none.",
    )
    benign_weights: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (10.0, 1.6, 2.5, 4.0, 6.3, 16.0, 25.0, 40.0, 63.0),
        min_length=1,
        description="Weights of the benign half of the loss to try: a higher one turns spare safety into fewer false refusals.",
    )
    learning_rate: float = Field(1e-3, gt=0, description="Network: peak learning rate of AdamW.")
    weight_decay: float = Field(0.05, ge=0, description="Network: weight decay of AdamW.")
    batch_per_outcome: int = Field(32, ge=2, description="Network: states of each of the four outcomes in a batch.")
    epochs: int = Field(40, ge=1, description="Network: epochs at most.")
    patience: int = Field(
        12, ge=1, description="Network: epochs without a better validation AUROC in any layer before stopping."
    )
    validation_share: float = Field(0.2, gt=0, lt=1, description="Share of the prompts that validate.")

    @field_validator("refine_band")
    @classmethod
    def _from_and_up_to(cls, band: tuple[float, float]) -> tuple[float, float]:
        if band[0] >= band[1]:
            raise ValueError(f"a band that begins before it ends, not {band[0]:g} to {band[1]:g}")
        return band


class TuningSettings(_Settings):
    """Choosing layers, step length, steps, gate and window on the dev prompts, under the constraints."""

    etas: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.05, 0.044, 0.07),
        min_length=1,
        description="Lengths of a step to try, in RMS distances from the mean state, the middle one first; 0.1: as trained.",
    )
    band_share: float = Field(0.25, gt=0, le=1, description="Width of the layer bands to try, as a share of the depth.")
    bands: int = Field(
        3,
        ge=1,
        description="Bands (each of one benign weight) that are tried with every length, the best of the screening.",
    )
    steps: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1,), min_length=1, description="Numbers of steps K to try; the way is divided among them."
    )
    windows: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0,), min_length=1, description="Numbers of generated tokens to steer."
    )
    gates: tuple[Annotated[float, Field(ge=0, le=1)] | None, ...] = Field(
        (None,),
        min_length=1,
        description="Gates to try: quantiles of the energies of desirable states, none for no gate.",
    )
    guards: tuple[bool, ...] = Field((True,), min_length=1, description="Whether the guard is tried on, off or both.")
    tokens: int = Field(24, ge=4, description="Tokens of an answer that tuning looks at most.")
    finalists: int = Field(4, ge=1, description="Settings that are judged on whole verdicts after the screening.")
    least_removed: float = Field(
        0.0, description="Share of the false refusals on dev that must go: settings with no more are not taken."
    )
    safety_margin: float = Field(
        0.05, description="How far harmful refusals on dev must be above the plain model's, as a share of the prompts."
    )
    safety_weighted: float = Field(
        0.0, description="Least weighted change of harmful refusals, less its standard error (refusal_level)."
    )
    worst_source: float = Field(
        -0.02,
        description="Least weighted change on any one source of 20 prompts or more, plus a standard error (of many more).",
    )
    refusal_level: float = Field(
        0.8,
        ge=0,
        lt=1,
        description="Weighted: prompts of which the plain model refuses fewer count as if it refused this share.",
    )
    perplexity_ratio: float = Field(1.05, description="Perplexity of steered over plain answers, at most.")
    kl: float = Field(0.02, description="KL per token on neutral prompts, nats, at most.")
    quality_prompts: int = Field(
        128, ge=4, description="Prompts that the plain model answers, for the perplexity and degenerate answers."
    )
    quality_tokens: int = Field(40, ge=4, description="Length of those answers in tokens.")
    neutral_prompts: int = Field(24, ge=2, description="Neutral prompts for the KL.")

    def measuring(self) -> dict[str, Any]:
        """What all findings of trials rest on: all but what says which settings are tried and taken, or is in a trial's key."""
        return self.model_dump(mode="json", exclude=_WHICH_ARE_TRIED | _IN_THE_KEY)


class FitSettings(_Settings):
    """All of `elsteer fit`."""

    seed: int = Field(0, ge=0, lt=2**32, description="Seed of splits, training and controls.")
    dev_share: float = Field(
        0.3, gt=0, lt=1, description="Share of the prompts set aside for tuning where no dev set is given."
    )
    limit: int | None = Field(None, ge=16, description="Training prompts at most, drawn by seed, stratified by source.")
    dev_limit: int | None = Field(None, ge=16, description="Dev prompts at most.")
    attacks: tuple[str, ...] = Field(
        ("all",),
        validate_default=True,
        description="Families of jailbreaks that training and dev prompts are put in as well (`elsteer suites`), all or none.",
    )
    attack_share: float = Field(0.08, gt=0, le=1, description="Share of the training prompts that are.")
    attack_dev_share: float = Field(0.25, gt=0, le=1, description="Share of the dev prompts that are.")
    shuffle_outcomes: bool = Field(False, description="Negative control: train on outcomes shuffled among the prompts.")
    collect: CollectSettings = CollectSettings()
    training: TrainingSettings = TrainingSettings()
    tuning: TuningSettings = TuningSettings()

    @classmethod
    def read(cls, path: Path) -> Self:
        """Of the settings.yaml that a fit wrote."""
        import yaml  # not for every --help

        try:
            return cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (ValueError, yaml.YAMLError, OSError, RecursionError) as error:
            why = " ".join(str(error).split())[:200]
            raise RunError(
                f"{path} does not hold settings of this version of elsteer ({why}): mend it, or fit into another folder."
            ) from error

    @field_validator("attacks", mode="before")
    @classmethod
    def _all_or_none(cls, names: Any) -> Any:
        if names is None or isinstance(names, str):
            names = [names]
        if isinstance(names, list | tuple) and len(names) == 1 and names[0] in (None, "none", "all"):
            from elsteer.prompts.attacks import fitting_families  # not for every --help

            return fitting_families() if names[0] == "all" else ()
        return names

    @field_validator("attacks")
    @classmethod
    def _may_be_fitted_on(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if names:
            from elsteer.prompts.attacks import fitting_families  # not for every --help

            known = fitting_families()
            if unfit := [name for name in names if name not in known]:
                raise ValueError(
                    f"some of {', '.join(known)}: {unfit[0]} is no family of attacks that may be fitted on"
                )
        return names
