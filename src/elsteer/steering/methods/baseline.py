"""What a baseline is: a way to make candidates out of the same evidence that a landscape is fitted on.

A `Candidate` is one setting of one method, ready to attach. A `Baseline` makes its candidates from `Evidence`
(`elsteer.steering.evidence`); the tuner picks among them on dev, by the same rules and with at most the same number of trials for
every method. Each baseline is one file beside this one, with its formula and source, and one line in BASELINES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from elsteer.steering.attach import Move, Steering

if TYPE_CHECKING:
    from elsteer.steering.evidence import Evidence

__all__ = ["Baseline", "Candidate"]


@dataclass(frozen=True)
class Candidate:
    """One setting of one method.

    method: its name. settings: what makes it, a dictionary of what JSON can hold; unique among the method's candidates.
    moves: by decoder block, what moves its states; empty where the model itself is left alone. window: generated tokens that
    are moved after the prompt's last one. system: a system prompt that is put before every chat, or None. strength:
    multiplies every move.
    """

    method: str
    settings: Mapping[str, Any]
    moves: Mapping[int, Move] = field(default_factory=dict)
    window: int = 0
    system: str | None = None
    strength: float = 1.0

    def attach(self, model: PreTrainedModel) -> AbstractContextManager[Steering | None]:
        """Steer `model` until the `with` block ends; it gives None where there is nothing to attach."""
        if not self.moves or self.strength == 0:
            return nullcontext()
        return Steering(model, self.moves, window=self.window, strength=self.strength)

    def scaled(self, by: float) -> Candidate:
        """The same at `by` times its strength: a point further along its frontier."""
        return replace(self, strength=self.strength * by)


@dataclass(frozen=True)
class Baseline:
    """A method to compare with.

    name: as on the command line. title: its full name. candidates(evidence) gives the
    settings to tune over, at most about two dozen, ordered by strength within each layer choice. learns: whether they depend on
    what is in the evidence. version: raised where candidates of the same settings become others.
    """

    name: str
    title: str
    candidates: Callable[[Evidence], list[Candidate]]
    learns: bool = True
    version: int = 1
