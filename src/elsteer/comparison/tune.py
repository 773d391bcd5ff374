"""Tuning of a baseline: the fit's own tuner, dev rows and constraints, over the candidates of the method.

    screening   at most `budget` candidates, by their first tokens and the KL on neutral prompts
    verdicts    whole answers of the `finalists` best of these, settings that differ in the window alone once
    window      the best of these with its other windows
    strength    the best at 0.5, 0.7 and 1.4 times its strength, screened; verdicts of the best of those three and, where that
                breaks a bound, of the next
    chosen      of those that keep safety and the KL bound, the one that answers most benign prompts

A landscape of ours must gain refusals, and surely not lose them once they are weighted. A baseline need only keep them: it may
lose a point, and weighted as much as an error explains. Perplexity and degenerate answers are not asked of it, nor, where it is a
system prompt, the KL. Worth is the share removed less six times what safety lacks. Where none keeps the bounds and removes
anything, the best worth stands for the method, and `Tuned.feasible` says whether it keeps the bounds. Every trial is a row of
a JSONL file, so a killed run goes on where it was.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from elsteer.completions import PromptCaches
from elsteer.decoding import score
from elsteer.errors import RunError
from elsteer.evaluation.quality import kl_of_logits
from elsteer.run import key_of
from elsteer.steering.methods.baseline import Candidate
from elsteer.tuning import ABOVE_KL, Trial, Tuner, order, rates, read_trials

__all__ = ["BUDGET", "FINALISTS", "Tuned", "tune_baseline"]

BUDGET, FINALISTS = 24, 4
STRENGTHS = (0.5, 0.7, 1.4)  # times that of the best finalist
_UNSTEERED = ("_openers", "_plain_first", "_plain_answers", "_plain_neutral", "_plain_logits")
Caches = Callable[[str], tuple[PromptCaches, PromptCaches]]


@dataclass(frozen=True)
class Tuned:
    """What tuning chose for one method: the candidate, its trial on dev, whether it keeps all constraints, all trials."""

    candidate: Candidate
    trial: Trial
    feasible: bool
    trials: list[Trial]


def tune_baseline(
    shared: Tuner,
    candidates: Sequence[Candidate],
    path: Path,
    *,
    budget: int = BUDGET,
    finalists: int = FINALISTS,
    with_system: Caches | None = None,
    made: str = "",
) -> Tuned:
    """Choose one of `candidates` on the dev prompts of `shared`, a tuner whose energies are not used.

    path: JSONL of the trials. with_system: dev and neutral caches under a system prompt, for candidates that have one.
    made: of what candidates and prompts are made; trials of another are not taken over.
    Raises RunError where there is no candidate.
    """
    if not candidates:
        raise RunError("This method has no candidate for this model.")
    return _BaselineTuner(shared, _spread(candidates, budget), path, with_system, made, finalists).choose()


def _spread(candidates: Sequence[Candidate], budget: int) -> list[Candidate]:
    """At most `budget` of them, evenly over their order."""
    if len(candidates) <= budget:
        return list(candidates)
    return [candidates[round(at * (len(candidates) - 1) / max(1, budget - 1))] for at in range(budget)]


class _BaselineTuner(Tuner):
    """The fit's tuner, whose rules are the settings of candidates."""

    weighted_errors = 1.0

    def __init__(
        self,
        shared: Tuner,
        candidates: Sequence[Candidate],
        path: Path,
        with_system: Caches | None = None,
        made: str = "",
        finalists: int = FINALISTS,
    ) -> None:
        self.__dict__.update(copy.copy(shared).__dict__)
        self.shared, self.settings = shared, shared.settings.model_copy(update={"finalists": finalists})
        self.candidates = {_key(one): one for one in candidates}
        self.path, self.with_system, self.made = path, with_system, made
        self.trials = read_trials(path)
        self.own: dict[str, tuple[PromptCaches, PromptCaches]] = {}
        self.firsts: dict[Hashable, list[int]] = {}  # first tokens by group: the window comes after them
        self.screening: Hashable = None

    def landscape(self, rule: dict[str, Any]) -> Any:
        """The candidate of these settings."""
        return self.candidates[json.dumps(rule, sort_keys=True)]

    def choose(self) -> Tuned:
        screened = self._screen([_rule(one) for one in self.candidates.values()])
        judged = self._finalists(screened)
        judged += [self._verdicts(rule) for rule in self._around(judged)]
        self._bound_kl(screened, judged)
        best = self._best(judged)
        more = self._screen(self._strengths(best))
        if more:
            first = next(trial for trial in screened if trial.rule == best.rule)
            beyond = [after - before for after, before in zip(rates(best), rates(first), strict=True)]
            more.sort(key=lambda trial: (ABOVE_KL not in trial.why_not, self._worth(trial, beyond)), reverse=True)
            screened += more
            for trial in more[:2]:
                judged.append(self._verdicts(trial.rule))
                self._bound_kl(screened, judged)
                if judged[-1].feasible:
                    break
        best = self._best(judged)
        return Tuned(self.landscape(best.rule), best, best.feasible, [*screened, *judged])

    def _best(self, judged: list[Trial]) -> Trial:
        """Of those that keep the bounds and remove anything the one that answers most; without one the best worth.

        Of these too one that removes something goes before one that adds false refusals, however safe that is.
        """
        removing = [trial for trial in judged if trial.removed > 0]
        if kept := [trial for trial in removing if trial.feasible]:
            return max(kept, key=order)
        return max(removing or judged, key=self._worth)

    def _open(self, screened: list[Trial]) -> list[Trial]:
        return super()._open(screened) or screened  # one of them stands for the method

    def _group(self, rule: dict[str, Any]) -> Hashable:
        return json.dumps({name: rule[name] for name in rule if name != "window"}, sort_keys=True)

    def _per_group(self) -> int:
        return 1

    def _around(self, judged: list[Trial]) -> list[dict[str, Any]]:
        """The best setting with its other windows."""
        best = self._best(judged).rule
        rules = [_rule(one) for one in self.candidates.values()]
        return [rule for rule in rules if rule != best and self._group(rule) == self._group(best)]

    def _strengths(self, trial: Trial) -> list[dict[str, Any]]:
        candidate = self.landscape(trial.rule)
        if not (candidate.moves and candidate.strength):
            return []
        scaled = [candidate.scaled(by) for by in STRENGTHS]
        self.candidates |= {_key(one): one for one in scaled}
        return [_rule(one) for one in scaled]

    def _bound_kl(self, screened: Sequence[Trial], judged: Sequence[Trial]) -> None:
        kl = {json.dumps(trial.rule, sort_keys=True): trial for trial in screened}
        for trial in judged:  # verdicts do not measure the KL again
            trial.kl = kl[json.dumps(trial.rule, sort_keys=True)].kl
            if trial.kl is not None and not trial.kl <= self.settings.kl and ABOVE_KL not in trial.why_not:
                trial.why_not.append(ABOVE_KL)
            self._without_system(trial)

    def _tried(self, rule: dict[str, Any], stage: str, run: Callable[[dict[str, Any]], Trial]) -> Trial:
        stage = f"{stage} {self.made}" if self.made else stage
        if key_of(stage, rule) not in self.trials:
            self._take_over()
        return super()._tried(rule, stage, run)

    def _take_over(self) -> None:
        """What the model does unsteered, which is computed once for all methods."""
        self.shared._first_tokens()
        self.shared.plain_neutral()
        self.__dict__.update({name: self.shared.__dict__[name] for name in _UNSTEERED})

    def _screened(self, rule: dict[str, Any]) -> Trial:
        self.screening = self._group(rule)
        with _Caches(self, rule):
            return self._without_system(super()._screened(rule))

    def _without_system(self, trial: Trial) -> Trial:
        """A system prompt may change how everything is said."""
        if self.landscape(trial.rule).system is not None:
            trial.why_not = [why for why in trial.why_not if why != ABOVE_KL]
        return trial

    def _first(self, steering: Any, progress: Callable[[int, int], None] | None = None) -> list[int]:
        if steering is None:
            return super()._first(steering, progress)
        if self.screening not in self.firsts:
            self.firsts[self.screening] = super()._first(steering, progress)
        return self.firsts[self.screening]

    def _judged(self, rule: dict[str, Any]) -> Trial:
        with _Caches(self, rule):
            return super()._judged(rule)

    def _kl(self, rule: dict[str, Any]) -> float:
        candidate = self.landscape(rule)
        if candidate.system is None:
            return super()._kl(rule) if candidate.moves and candidate.strength else 0.0
        return self._kl_of_system()

    def _kl_of_system(self) -> float:
        """Nats per token on the neutral prompts along the plain answers, the other side under a system prompt."""
        given = {
            one: answer.tokens[: self.settings.quality_tokens] or [0] for one, answer in self.plain_neutral().items()
        }
        before = _logits(self.shared.neutral, given)
        found = [float(kl_of_logits(before[one].float(), q)) for one, q in _logits(self.neutral, given).items()]
        return sum(found) / len(found)


class _Caches:
    """While open, the tuner's caches are those of the candidate's system prompt, where it has one."""

    def __init__(self, tuner: _BaselineTuner, rule: dict[str, Any]) -> None:
        self.tuner, self.system = tuner, tuner.landscape(rule).system

    def __enter__(self) -> None:
        if self.system is None:
            return
        if self.tuner.with_system is None:
            raise RunError("This method puts a system prompt before the chat, and no caches for it were given.")
        if self.system not in self.tuner.own:
            self.tuner.own = {self.system: self.tuner.with_system(self.system)}  # one at a time: they are large
        self.tuner.dev, self.tuner.neutral = self.tuner.own[self.system]

    def __exit__(self, *_: object) -> None:
        self.tuner.dev, self.tuner.neutral = self.tuner.shared.dev, self.tuner.shared.neutral


def _logits(caches: PromptCaches, given: dict[str, list[int]]) -> dict[str, Tensor]:
    """By prompt id, logits (tokens, V) along the given answers, in float16."""
    found = {}
    for batch in caches.batches():
        answers = [given[caches.prompts[place].id] for place in batch.rows]
        for place, logits in zip(batch.rows, score(caches.model, batch, answers), strict=True):
            found[caches.prompts[place].id] = logits.half()
    return found


def _rule(candidate: Candidate) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_key(candidate))
    return found


def _key(candidate: Candidate) -> str:
    return json.dumps(
        {**candidate.settings, "method": candidate.method, "strength": candidate.strength}, sort_keys=True
    )
