"""Evidence: what a baseline may learn from, the training prompts of a fit with their states and plain verdicts.

`Evidence.of_run` reads a run folder that `elsteer.fit` has filled, so that every method learns from the same prompts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from elsteer.completions import read_completions
from elsteer.energy.standard import standardised, weighted_sums
from elsteer.errors import RunError
from elsteer.run import RunFolder
from elsteer.settings import FitSettings
from elsteer.states import StateStore

__all__ = ["OUTCOMES", "Evidence", "OutcomeMeans"]

# Of a prompt: (harmful, refused).
OUTCOMES = {
    "helpful": (False, False),
    "false_refusal": (False, True),
    "safe_refusal": (True, True),
    "jailbreak": (True, False),
}


@dataclass(frozen=True)
class OutcomeMeans:
    """Of one layer's states: mean (d,) in float64 and number of the prompts of each outcome that occurs; the spread.

    spread: root mean square of the distance to the mean of all, the unit in which step lengths are given.
    """

    mean: dict[str, Tensor]
    count: dict[str, int]
    spread: float

    def of(self, *outcomes: str) -> Tensor:
        """(d,) mean of the prompts of these outcomes together. Raises RunError where there is none."""
        present = [name for name in outcomes if name in self.mean]
        total = sum(self.count[name] for name in present)
        if not total:
            raise RunError(
                f"No training prompt has the outcome {' or '.join(outcomes)}, which this method learns from: give more prompts."
            )
        return torch.stack([self.mean[name] * (self.count[name] / total) for name in present]).sum(dim=0)


@dataclass
class Evidence:
    """States and verdicts of n prompts that the judge scored.

    harmful, refused: (n,) bool, of the prompt and of the plain model's answer. depth: decoder blocks of the model, which all have
    states. seed: of whatever a baseline draws. `states(layer)` gives (n, d) float32: the input of the block at the
    prompt's last token. folder: where long work of a baseline keeps what it has finished, or None: nowhere.
    """

    harmful: Tensor
    refused: Tensor
    depth: int
    seed: int
    _store: StateStore
    _ids: Sequence[str]
    folder: Path | None = None
    _means: dict[int, OutcomeMeans] = field(default_factory=dict, repr=False)

    @classmethod
    def of_run(cls, run_dir: str | Path) -> Evidence:
        """Of the training prompts of a fit. Raises RunError where its files are not there or not complete."""
        run = RunFolder(run_dir)
        if not (run / "settings.yaml").exists():
            raise RunError(f"{run.path} holds no settings.yaml: give the folder of a finished `elsteer fit`.")
        settings = FitSettings.read(run / "settings.yaml")
        known = read_completions(run / "glimpses.jsonl") | read_completions(run / "completions.jsonl")
        prompts = run.prompts("train")
        if missing := [one.id for one in prompts if one.id not in known]:
            raise RunError(f"{run.path} lacks the answers of {len(missing)} training prompts: run the fit to its end.")
        store = StateStore(run / "states")
        scored = [one for one in prompts if known[one.id].label in ("refusal", "compliance")]
        if not scored:
            raise RunError(f"{run.path} holds no training prompt that the judge could score.")
        ids = [one.id for one in scored]
        depth = store.read(ids[:1], tokens=1)[0].shape[2]
        return cls(
            torch.tensor([one.harmful for one in scored]),
            torch.tensor([known[one.id].label == "refusal" for one in scored]),
            depth,
            settings.seed,
            store,
            ids,
            run / "baselines",
        )

    def states(self, layer: int) -> Tensor:
        """(n, d) float32 inputs of decoder block `layer` at the prompts' last tokens."""
        return self._store.read(self._ids, tokens=1, layers=slice(layer, layer + 1))[0][:, 0, 0].float()

    def digest(self) -> str:
        """SHA-256 of the prompts' names and verdicts and of the seed: what long work that is kept was made of."""
        told = (list(self._ids), self.harmful.tolist(), self.refused.tolist(), self.depth, self.seed)
        return hashlib.sha256(repr(told).encode()).hexdigest()

    def rows(self, outcome: str) -> Tensor:
        """(n,) bool: the prompts of one of OUTCOMES."""
        harmful, refused = OUTCOMES[outcome]
        return (self.harmful == harmful) & (self.refused == refused)

    def means(self, layer: int) -> OutcomeMeans:
        """Means by outcome of a layer's states; kept, so that methods share one pass over them."""
        if layer not in self._means:
            states = self.states(layer)
            rows = {name: self.rows(name) for name in OUTCOMES}
            present = [name for name, mask in rows.items() if bool(mask.any())]
            shares = torch.stack([rows[name].double() / rows[name].sum() for name in present])
            _, scale = standardised(states)
            self._means[layer] = OutcomeMeans(
                dict(zip(present, weighted_sums(shares, states), strict=True)),
                {name: int(rows[name].sum()) for name in present},
                float(scale) * math.sqrt(states.shape[1]),
            )
        return self._means[layer]
