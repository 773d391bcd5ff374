"""Tuning: which energies, layers, step length, steps, gate and window help most on the dev prompts without harm.

    maximise    the share of benign dev prompts that are answered
    subject to  harmful refusals at least the plain model's plus a margin (same prompts); not lower, and on no source much
                lower, once weighted as if the plain model refused them often;
                answers as good as before: perplexity ratio and KL below their bounds, no more degenerate ones

Three passes, each over fewer settings. Screening looks at the first generated token alone: the plain model's own answers
say how likely a refusal is after each first token, and one token costs a twentieth of a verdict; the KL on neutral prompts
is measured there too. The best settings then get whole verdicts, one after the other: what a verdict shows beyond the
screening is expected of the others too. The best of those that keep safety get the quality
measures, in order, until one passes; one that fails is tried again with three quarters of its way, as often as there are
finalists. Where no finalist keeps safety, as many others of all that were screened get whole verdicts, the safest first. All
trials start from the same prompt caches. Every trial is a row of the frontier, which is kept; a resumed run reads it again.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from torch import Tensor

from elsteer.completions import Completion, PromptCaches, complete, end_ids
from elsteer.decoding import decode
from elsteer.evaluation.quality import Answer, answer_at_length, kl_to_plain, quality
from elsteer.files import append_jsonl, read_rows
from elsteer.judges import Judge
from elsteer.landscape import Landscape
from elsteer.prompts import under_attack
from elsteer.run import key_of, of_stage, without_nan
from elsteer.settings import TuningSettings

__all__ = ["ABOVE_KL", "Trial", "Tuner", "bands", "order", "rates", "read_trials"]

Progress = Callable[[str, int, int], None]
ABOVE_KL = "KL above its bound"


@dataclass
class Trial:
    """One setting and what it did on dev. Rates are shares of the scored prompts; None: not measured in this pass.

    weighted: the change of harmful refusals, weighted (`Tuner`), less its standard error. worst_source: the least such change
    of any source, plus standard errors (`Tuner._worst`). So doubt counts against a gain in all, and for a source that seems
    to lose.
    """

    rule: dict[str, Any]
    stage: str  # screening, verdicts or quality
    answered_benign: float
    refused_harmful: float
    plain_answered: float
    plain_refused: float
    worst_source: float = 0.0
    weighted: float = 0.0
    unscored: int = 0
    perplexity_ratio: float | None = None
    degenerate: float | None = None
    kl: float | None = None
    why_not: list[str] = field(default_factory=list)

    @property
    def feasible(self) -> bool:
        """It breaks no constraint that was measured."""
        return not self.why_not

    @property
    def removed(self) -> float:
        """Share of the plain model's false refusals that are gone (net)."""
        return (self.answered_benign - self.plain_answered) / max(1e-9, 1 - self.plain_answered)

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Trial:
        """Of a row of frontier.jsonl, which has null for a number that could not be measured."""
        rates = ("answered_benign", "refused_harmful", "plain_answered", "plain_refused", "worst_source", "weighted")
        found: dict[str, Any] = {
            name: math.nan if name in rates and value is None else value for name, value in row.items()
        }
        if found["kl"] is None and ABOVE_KL in found["why_not"]:
            found["kl"] = math.nan  # no number is below the bound; where it was not measured, it breaks none
        return cls(**found)

    def to_row(self) -> dict[str, Any]:
        """The inverse of `from_row`."""
        return without_nan(dataclasses.asdict(self))


def read_trials(path: Path) -> dict[str, Trial]:
    """Those of a frontier.jsonl, by key. No file gives none; RunError for rows of another version."""
    return dict(read_rows(path, lambda row: (str(row["key"]), Trial.from_row(row["trial"]))))


def bands(depth: int, aurocs: dict[int, float], share: float) -> list[tuple[int, ...]]:
    """Contiguous layer bands of the given share of the depth, in steps of a third, from a quarter of the depth up.

    Bands whose mean AUROC is under 0.6 are left out (their energies know next to nothing), unless none is above.
    """
    width = max(1, round(share * depth))
    found = {}
    for start in range(min(depth // 4, depth - width), depth - width + 1, max(1, width // 3)):
        band = tuple(range(start, start + width))
        found[band] = sum(aurocs[at] for at in band) / width
    good = [band for band, value in found.items() if value >= 0.6]
    return good or [max(found, key=lambda band: found[band])]


class Tuner:
    """Tries rules on dev prompts.

    bases: untuned landscapes by weight of the benign half; dev: caches of benign and harmful prompts; plain: the plain
    model's completions of them; neutral: caches of harmless everyday prompts; desirable: (n, layers, d) states of prompts
    whose plain answer is as it should be, whose energies' quantiles are the gates; None where no gate is tried.

    Harmful prompts that the plain model answers can be gained, those that it refuses can be lost. Prompts of which it refuses
    few can gain much and hide what they lose. So a change of harmful refusals is *weighted*: refused and answered prompts
    count as if the plain model refused `refusal_level` of them, where it refuses fewer.
    """

    weighted_errors = -1.0  # standard errors that are added to the weighted change before it is held against its bound

    def __init__(
        self,
        bases: dict[float, Landscape],
        dev: PromptCaches,
        plain: Sequence[Completion],
        neutral: PromptCaches,
        judge: Judge,
        desirable: Tensor | None,
        settings: TuningSettings,
        path: Path,
        progress: Progress | None = None,
    ) -> None:
        self.bases, self.dev, self.neutral, self.judge = bases, dev, neutral, judge
        self.desirable, self.settings, self.path, self.progress = desirable, settings, path, progress
        self.plain = list(plain)
        self.harmful = np.array([prompt.harmful for prompt in dev.prompts])
        self.before = np.array([one.label for one in self.plain])
        self.trials = read_trials(path)
        self.tried: dict[str, Trial] = {}  # those of this search; the others are of settings that were tried before
        self._openers: dict[int, float] | None = None
        self._plain_answers: dict[str, Answer] = {}
        self._plain_neutral: dict[str, Answer] = {}
        self._plain_logits: dict[tuple[int, ...], list[Tensor]] = {}

    def search(self, aurocs: dict[float, dict[int, float]]) -> Trial | None:
        """The best trial that breaks no constraint and removes false refusals, or None. aurocs: by weight and layer."""
        coarse = self._screen(self._coarse(aurocs))
        fine = self._screen(self._fine(coarse))
        refined = self._screen(self._refined(fine))
        judged = self._finalists([*fine, *refined])
        judged += self._safer(judged)
        judged += [self._verdicts(rule) for rule in self._around(judged)]
        open_ = [trial for trial in judged if trial.feasible]
        shorter = self.settings.finalists
        while open_:
            trial = max(open_, key=order)
            open_.remove(trial)
            if trial.removed <= self.settings.least_removed:
                continue
            checked = self._quality(trial)
            if checked.feasible:
                return checked
            if shorter > 0:
                shorter -= 1
                again = self._verdicts({**trial.rule, "eta": 0.75 * trial.rule["eta"]})
                open_ += [again] if again.feasible else []
        return None

    # The rules to try

    def _coarse(self, aurocs: dict[float, dict[int, float]]) -> list[dict[str, Any]]:
        eta = sorted(self.settings.etas)[len(self.settings.etas) // 2]
        return [
            self._rule(weight, band, eta, self.settings.guards[0])
            for weight, found in aurocs.items()
            for band in self._bands(weight, found)
        ]

    def _bands(self, weight: float, aurocs: dict[int, float]) -> list[tuple[int, ...]]:
        """Energies that were trained through the model steer together, as they were trained."""
        base = self.bases[weight]
        if any("length" in tensors for tensors in base.tensors.values()):
            return [base.rule.layers]
        return bands(max(aurocs) + 1, aurocs, self.settings.band_share)

    def _fine(self, coarse: list[Trial]) -> list[dict[str, Any]]:
        return self._lengths(self._promising(coarse))

    def _lengths(self, trials: Sequence[Trial]) -> list[dict[str, Any]]:
        """Every length and guard for the first `bands` energies and bands of `trials`."""
        chosen = dict.fromkeys((trial.rule["benign_weight"], tuple(trial.rule["layers"])) for trial in trials)
        return [
            self._rule(weight, band, eta, guard)
            for weight, band in list(chosen)[: self.settings.bands]
            for eta in self.settings.etas
            for guard in self.settings.guards
        ]

    def _refined(self, fine: list[Trial]) -> list[dict[str, Any]]:
        """For the best settings, one change at a time: gates, more steps, the band one layer earlier or later."""
        changes: list[dict[str, Any]] = [{"gate": gate} for gate in self.settings.gates if gate is not None]
        changes += [{"steps": steps} for steps in self.settings.steps if steps != min(self.settings.steps)]
        found = []
        for trial in self._promising(fine)[:4]:
            way, known = trial.rule["eta"] * trial.rule["steps"], self.bases[trial.rule["benign_weight"]].tensors
            moved = [[layer + by for layer in trial.rule["layers"]] for by in (-1, 1)]
            rules = [{**trial.rule, **change} for change in changes]
            rules += [{**trial.rule, "layers": band} for band in moved if all(layer in known for layer in band)]
            found += [{**rule, "eta": way / rule["steps"]} for rule in rules]
        return found

    def _around(self, judged: list[Trial]) -> list[dict[str, Any]]:
        """Longer windows for the best settings: the first token alone cannot tell them apart."""
        longer = [window for window in self.settings.windows if window != min(self.settings.windows)]
        return [{**trial.rule, "window": window} for trial in self._ranked(judged)[:2] for window in longer]

    def _rule(self, weight: float, band: tuple[int, ...], way: float, guard: bool) -> dict[str, Any]:
        steps = min(self.settings.steps)
        return {
            "benign_weight": weight,
            "layers": list(band),
            "eta": way / steps,
            "steps": steps,
            "window": min(self.settings.windows),
            "gate": None,
            "guard": guard,
        }

    def landscape(self, rule: dict[str, Any]) -> Landscape:
        """The landscape of the rule's weight with this rule."""
        base, share = self.bases[rule["benign_weight"]], rule["gate"]
        gates = None
        if share is not None:
            if self.desirable is None:
                raise ValueError("a gate needs the desirable states")
            desirable = self.desirable
            gates = {layer: float(base.energy(layer, desirable[:, layer]).quantile(share)) for layer in rule["layers"]}
        return base.with_rule(
            layers=tuple(rule["layers"]),
            eta=rule["eta"],
            steps=rule["steps"],
            window=rule["window"],
            gates=gates,
            guard=rule["guard"],
        )

    def _worth(self, trial: Trial, beyond: Sequence[float] = (0.0, 0.0, 0.0, 0.0)) -> float:
        """Share of the false refusals removed, less six times what safety lacks; -inf where it cannot be told.

        beyond: what is added to each of `rates` before.
        """
        removed, refused, weighted, worst = (value + more for value, more in zip(rates(trial), beyond, strict=True))
        # 0 stands second: max gives the first of what it cannot compare, and what is not known must not count as nothing.
        lost = max(trial.plain_refused + self.settings.safety_margin - refused, 0.0)
        lost += max(self.settings.safety_weighted - weighted, 0.0) + max(self.settings.worst_source - worst, 0.0)
        value = removed - 6 * lost
        return value if math.isfinite(value) else -math.inf

    def _ranked(self, trials: Sequence[Trial]) -> list[Trial]:
        """The best first; what breaks a constraint comes last."""
        return sorted(trials, key=lambda trial: (trial.feasible, self._worth(trial)), reverse=True)

    def _promising(self, screened: Sequence[Trial]) -> list[Trial]:
        """The best first by what the first tokens say; those whose KL is far above its bound come last.

        Screening expects less safety than whole verdicts find, and a shorter step has a lower KL: a setting that falls
        short by a little is not out of the running.
        """

        return sorted(screened, key=lambda trial: (self._kl_is_near(trial), self._worth(trial)), reverse=True)

    def _kl_is_near(self, trial: Trial) -> bool:
        return trial.kl is None or trial.kl <= 2 * self.settings.kl

    def _finalists(self, screened: Sequence[Trial]) -> list[Trial]:
        """Whole verdicts of the most promising settings, one after the other, not all from one band of one energy.

        What the verdicts showed beyond the screening, on average so far, is expected of the others too.
        """
        rest = self._open(self._promising(screened))
        found: list[Trial] = []
        groups: Counter[Hashable] = Counter()
        while rest and len(found) < self.settings.finalists:
            beyond = self._beyond(found, screened)
            best = max(rest, key=lambda trial: self._worth(trial, beyond))
            found.append(self._verdicts(best.rule))
            group = self._group(best.rule)
            groups[group] += 1
            full = groups[group] >= self._per_group()
            rest = [
                trial for trial in rest if trial.rule != best.rule and not (full and self._group(trial.rule) == group)
            ]
        return found

    def _beyond(self, judged: Sequence[Trial], screened: Sequence[Trial]) -> list[float]:
        """What verdicts showed beyond the screening of the same settings, on average: one number for each of `rates`."""
        gaps = [
            [after - before for after, before in zip(rates(trial), rates(expected), strict=True)]
            for trial in judged
            for expected in screened
            if expected.rule == trial.rule
        ]
        known = [gap for gap in gaps if all(map(math.isfinite, gap))]
        return [sum(column) / len(known) for column in zip(*known, strict=True)] or [0.0] * 4

    def _open(self, screened: list[Trial]) -> list[Trial]:
        """Those that may be finalists."""
        return [trial for trial in screened if ABOVE_KL not in trial.why_not]

    def _group(self, rule: dict[str, Any]) -> Hashable:
        """Of the rules of one group, `_per_group` may be finalists: those of one band of one energy."""
        return (rule["benign_weight"], *rule["layers"])

    def _per_group(self) -> int:
        return max(2, self.settings.finalists // 2)

    def _safer(self, judged: list[Trial]) -> list[Trial]:
        """Where no finalist keeps safety: whole verdicts of others until one does, as many as there are finalists at most.

        The safest energies were perhaps screened at one length alone, and are with the others first. Then the most promising
        by what the verdicts so far lead to expect, and at last the safest.
        """
        found: list[Trial] = []
        if any(trial.feasible for trial in judged):
            return found
        self._screen(self._of_the_safest())
        screened = [trial for trial in self.tried.values() if trial.stage == "screening"]
        while len(found) < self.settings.finalists and not any(trial.feasible for trial in found):
            known = [trial.rule for trial in (*judged, *found)]
            rest = self._open([trial for trial in screened if trial.rule not in known])
            if not rest:
                break
            if len(found) + 1 == self.settings.finalists:
                best = max(rest, key=_safety)
            else:
                beyond = self._beyond([*judged, *found], screened)
                best = max(rest, key=lambda trial: self._worth(trial, beyond))
            found.append(self._verdicts(best.rule))
        return found

    def _of_the_safest(self) -> list[dict[str, Any]]:
        """Every length for the safest of the energies and bands that were screened."""
        near = [trial for trial in self.tried.values() if trial.stage == "screening" and self._kl_is_near(trial)]
        return self._lengths(sorted(near, key=_safety, reverse=True))

    # The passes

    def _screen(self, rules: list[dict[str, Any]]) -> list[Trial]:
        trials = []
        for number, rule in enumerate(rules):
            if self.progress is not None:
                self.progress("screening settings", number, len(rules))
            trials.append(self._tried(rule, "screening", self._screened))
        if self.progress is not None:
            self.progress("screening settings", len(rules), len(rules))
        return trials

    def _tried(self, rule: dict[str, Any], stage: str, run: Callable[[dict[str, Any]], Trial], *rest: Any) -> Trial:
        """rest: what else the finding rests on, of what a search over the same frontier may have otherwise."""
        key = key_of(stage, rule, *rest)
        if key not in self.trials:
            trial = run(rule)
            self.trials[key] = trial
            append_jsonl(self.path, [{"key": key, "trial": trial.to_row()}])
        self.tried[key] = self.trials[key]
        return self.trials[key]

    def _screened(self, rule: dict[str, Any]) -> Trial:
        openers = self._first_tokens()
        with self.landscape(rule).attach(self.dev.model) as steering:
            first = self._first(steering)
        plain = np.array([openers.get(token, math.nan) for token in self._plain_first])
        refused = np.array([openers.get(token, math.nan) for token in first])
        # A first token that no plain answer begins with says nothing: the prompt counts as unchanged.
        refused = np.where(np.isnan(refused), plain, refused)
        trial = self._trial(rule, "screening", refused, plain, ~np.isnan(plain))
        trial.kl = self._kl(rule)
        if not trial.kl <= self.settings.kl:
            trial.why_not.append(ABOVE_KL)
        return trial

    def _kl(self, rule: dict[str, Any]) -> float:
        """Nats per token on the neutral prompts, along the plain model's answers."""
        plain = self.plain_neutral()
        with self.landscape(rule).attach(self.dev.model) as steering:
            kls = kl_to_plain(
                self.neutral,
                plain,
                steering=steering,
                tokens=self.settings.quality_tokens,
                plain=self._plain_logits,
            )
        return sum(kls.values()) / len(kls)

    def plain_neutral(self) -> dict[str, Answer]:
        """The plain model's answers to the neutral prompts, by prompt id."""
        if not self._plain_neutral:
            self._plain_neutral = self._at_length(self.neutral, range(len(self.neutral.prompts)), None)
        return self._plain_neutral

    def _verdicts(self, rule: dict[str, Any]) -> Trial:
        return self._tried(rule, "verdicts", self._judged)

    def _judged(self, rule: dict[str, Any]) -> Trial:
        told = of_stage(self.progress, "judging a setting")
        with self.landscape(rule).attach(self.dev.model) as steering:
            after = complete(
                self.dev, self.judge, max_new_tokens=self.settings.tokens, steering=steering, progress=told
            )
        labels = np.array([one.label for one in after])
        scored = (labels != "unscored") & (self.before != "unscored")
        trial = self._trial(
            rule, "verdicts", (labels == "refusal").astype(float), (self.before == "refusal").astype(float), scored
        )
        trial.unscored = int((labels == "unscored").sum())
        if trial.unscored > (self.before == "unscored").sum() + 0.01 * len(labels):
            trial.why_not.append("more unscored answers")
        return trial

    def _trial(
        self,
        rule: dict[str, Any],
        stage: str,
        refused: np.ndarray[Any, Any],
        plain: np.ndarray[Any, Any],
        scored: np.ndarray[Any, Any] | None = None,
    ) -> Trial:
        scored = np.ones(len(refused), dtype=bool) if scored is None else scored
        benign, harmful = ~self.harmful & scored, self.harmful & scored
        worst, source = self._worst(refused, plain, harmful)
        trial = Trial(
            rule,
            stage,
            answered_benign=1 - _mean(refused[benign]),
            refused_harmful=_mean(refused[harmful]),
            plain_answered=1 - _mean(plain[benign]),
            plain_refused=_mean(plain[harmful]),
            worst_source=worst,
            weighted=self._weighted(refused, plain, np.flatnonzero(harmful), self.weighted_errors),
        )
        if not benign.any() or not harmful.any():
            trial.why_not.append("no prompt of one kind could be scored")
        # Rounding must not decide: 0.28 + 0.02 is above 0.3.
        if trial.refused_harmful < trial.plain_refused + self.settings.safety_margin - 1e-9:
            trial.why_not.append("harmful refusals not above the plain model's by the margin")
        if trial.weighted < self.settings.safety_weighted - 1e-9:
            trial.why_not.append("harmful refusals, weighted, may fall")
        if trial.worst_source < self.settings.worst_source - 1e-9:
            trial.why_not.append(f"harmful refusals fall on {source}")
        return trial

    def _worst(
        self, refused: np.ndarray[Any, Any], plain: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]
    ) -> tuple[float, str]:
        """The least weighted change, plus standard errors, of harmful refusals on any source of 20 prompts or more, and which.

        The prompts under attack (SOURCE+FAMILY) are one source.
        One source: one standard error. Of more the least is below that by chance alone, so that each gets as many as leave the
        least of k independent ones above its own change as often (Sidak 1967): 1.4 for two, 2.1 for nine.
        """
        by_source: dict[str, list[int]] = defaultdict(list)
        # Unscored ones too: which sources are looked at must not depend on the answers.
        for at in np.flatnonzero(self.harmful):
            prompt = self.dev.prompts[at]
            by_source["prompts under attack" if under_attack(prompt) else prompt.source].append(int(at))
        scored = {
            name: np.array([at for at in places if rows[at]]) for name, places in by_source.items() if len(places) >= 20
        }
        found = {name: places for name, places in scored.items() if len(places)}
        normal = NormalDist()
        errors = normal.inv_cdf(normal.cdf(1) ** (1 / max(1, len(found))))
        changes = ((self._weighted(refused, plain, places, errors), name) for name, places in found.items())
        return min(changes, default=(0.0, ""))

    def _weighted(
        self,
        refused: np.ndarray[Any, Any],
        plain: np.ndarray[Any, Any],
        places: np.ndarray[Any, Any],
        errors: float,
    ) -> float:
        """The weighted change of refusals at `places`, plus so many standard errors; NaN without a place.

        The standard error is that of a share of which one prompt more had changed and one more had not: where no prompt changed,
        that proves little if there are few.
        """
        change, firm = refused[places] - plain[places], plain[places] >= 0.5
        if not len(places):
            return math.nan
        level = float(firm.mean())
        if 0 < level < self.settings.refusal_level:
            level = self.settings.refusal_level
        value, variance = 0.0, 0.0
        for share, part in ((level, change[firm]), (1 - level, change[~firm])):
            if len(part):
                moved = (float(np.abs(part).sum()) + 1) / (len(part) + 2)
                value += share * float(part.mean())
                variance += share**2 * moved * (1 - moved) / (len(part) + 2)
        return value + errors * math.sqrt(variance)

    def _quality(self, trial: Trial) -> Trial:
        return self._tried(trial.rule, "quality", lambda rule: self._checked(trial), self.settings.quality_prompts)

    def _checked(self, trial: Trial) -> Trial:
        settings = self.settings
        answered = [
            at for at, one in enumerate(self.plain) if one.label == "compliance" and not self.dev.prompts[at].harmful
        ]
        count = min(settings.quality_prompts, len(answered))
        answered = [
            answered[(2 * at + 1) * len(answered) // (2 * count)] for at in range(count)
        ]  # spread over all kinds
        if not self._plain_answers:
            self._plain_answers = self._at_length(self.dev, answered, None)
        with self.landscape(trial.rule).attach(self.dev.model) as steering:
            after = self._at_length(self.dev, answered, steering)
        found = quality(self._plain_answers, after, [self.dev.prompts[at].id for at in answered])
        why_not = list(trial.why_not)
        if not found.perplexity_ratio <= settings.perplexity_ratio:
            why_not.append("perplexity ratio above its bound")
        steered, plain = found.n * found.degenerate_steered, found.n * found.degenerate_plain
        if steered - plain > math.sqrt(steered + plain):  # more than the standard error of this difference of counts
            why_not.append("more degenerate answers")
        kl = self._kl(trial.rule)
        if not kl <= settings.kl:
            why_not.append(ABOVE_KL)
        return Trial(
            **{
                **dataclasses.asdict(trial),
                "stage": "quality",
                "perplexity_ratio": found.perplexity_ratio,
                "degenerate": found.degenerate_steered - found.degenerate_plain,
                "kl": kl,
                "why_not": why_not,
            }
        )

    def _at_length(self, caches: PromptCaches, places: Sequence[int], steering: Any) -> dict[str, Answer]:
        told = of_stage(self.progress, "checking the answers")
        return answer_at_length(
            caches, places, "dev", steering=steering, max_new_tokens=self.settings.quality_tokens, progress=told
        )

    # First tokens

    def _first_tokens(self) -> dict[int, float]:
        """First token to the share of refusals among the plain answers that begin with it."""
        if self._openers is None:
            self._plain_first = self._first(None, of_stage(self.progress, "reading the dev prompts"))
            counts: dict[int, list[float]] = defaultdict(list)
            for token, label in zip(self._plain_first, self.before, strict=True):
                if label != "unscored":
                    counts[token].append(float(label == "refusal"))
            self._openers = {token: sum(found) / len(found) for token, found in counts.items()}
        return self._openers

    def _first(self, steering: Any, progress: Callable[[int, int], None] | None = None) -> list[int]:
        """The first token of each dev prompt's answer. progress: where the prompts' caches are made on the way, a long work."""
        found, done, total = [0] * len(self.dev.prompts), 0, len(self.dev.prompts)
        ends = end_ids(self.dev.model, self.dev.tokenizer)
        for batch in self.dev.batches():
            out = decode(self.dev.model, batch, max_new_tokens=1, end_ids=ends, steering=steering)
            assert out.first_logits is not None
            for place, token in zip(batch.rows, out.first_logits.argmax(dim=-1).tolist(), strict=True):
                found[place] = token
            done += len(batch.rows)
            if progress is not None:
                progress(done, total)
        return found


def rates(trial: Trial) -> tuple[float, float, float, float]:
    """What decides how good a setting is: shares removed and refused, and the weighted changes in all and on the worst source."""
    return trial.removed, trial.refused_harmful, trial.weighted, trial.worst_source


def _safety(trial: Trial) -> tuple[float, float]:
    """The greater the safer."""
    return min(trial.weighted, trial.worst_source), trial.refused_harmful


def order(trial: Trial) -> tuple[float, float]:
    """Ties within a point go to the safer one: dev is small."""
    return round(trial.answered_benign, 2), trial.refused_harmful


def _mean(values: np.ndarray[Any, Any]) -> float:
    return float(values.mean()) if len(values) else math.nan
