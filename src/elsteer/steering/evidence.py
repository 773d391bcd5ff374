"""Evidence: what a baseline may learn from, the training prompts of a fit with their states and plain verdicts.

`Evidence.of_run` reads a run folder that `elsteer.fit` has filled, so that every method learns from the same prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from elsteer.completions import read_completions
from elsteer.errors import RunError
from elsteer.files import read_jsonl
from elsteer.prompts import Prompt
from elsteer.run import RunFolder
from elsteer.settings import FitSettings
from elsteer.states import StateStore

__all__ = ["Evidence"]


@dataclass
class Evidence:
    """States and verdicts of n prompts that the judge scored.

    harmful, refused: (n,) bool, of the prompt and of the plain model's answer. depth: decoder blocks of the model, which all have
    states. seed: of whatever a baseline draws. `states(layer)` gives (n, d) float32: the input of the block at the
    prompt's last token.
    """

    harmful: Tensor
    refused: Tensor
    depth: int
    seed: int
    _store: StateStore
    _ids: Sequence[str]

    @classmethod
    def of_run(cls, run_dir: str | Path) -> Evidence:
        """Of the training prompts of a fit. Raises RunError where its files are not there or not complete."""
        run = RunFolder(run_dir)
        if not (run / "settings.yaml").exists():
            raise RunError(f"{run.path} holds no settings.yaml: give the folder of a finished `elsteer fit`.")
        settings = FitSettings.model_validate(yaml.safe_load((run / "settings.yaml").read_text(encoding="utf-8")))
        known = read_completions(run / "glimpses.jsonl") | read_completions(run / "completions.jsonl")
        prompts = [
            Prompt.from_row({name: value for name, value in row.items() if name != "split"})
            for row in read_jsonl(run / "prompts.jsonl")
            if row["split"] == "train"
        ]
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
        )

    def states(self, layer: int) -> Tensor:
        """(n, d) float32 inputs of decoder block `layer` at the prompts' last tokens."""
        return self._store.read(self._ids, tokens=1, layers=slice(layer, layer + 1))[0][:, 0, 0].float()
