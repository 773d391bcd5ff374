"""`compare`: methods against over-refusal side by side, on the same prompts, with the same judge and the same tuning budget.

`els` and its controls come from the run folder of a fit; the baselines learn from that fit's training prompts
(`elsteer.steering.evidence`) and are tuned on its dev prompts (`elsteer.comparison.tune`), under its constraints but one: it is
enough that they refuse no fewer harmful prompts than the plain model, where els must refuse more. Then each answers the suites.

Files in the output folder: frontier.METHOD.jsonl (every trial on dev), rows/SUITE.METHOD.STRENGTH.jsonl (an answer a row),
compare.json (figures), compare.md (the table), frontier.png.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elsteer.comparison.picture import Spot, comparison_picture
from elsteer.comparison.result import CONTROLS, ComparedMethod, ComparisonResult
from elsteer.comparison.tune import BUDGET, FINALISTS, Tuned, tune_baseline
from elsteer.comparison.words import markdown, sentence
from elsteer.completions import Completion, PromptCaches, complete, read_completions
from elsteer.errors import PromptError, RunError
from elsteer.evaluation.figures import Figure, machine, write_figures
from elsteer.evaluation.statistics import (
    Interval,
    detectable_difference,
    holm,
    mcnemar_exact,
    paired_difference,
    removed,
    removed_difference,
    wilson,
)
from elsteer.files import expanded, write_atomic
from elsteer.fitting import neutral_prompts
from elsteer.judges import judge_of_fit
from elsteer.landscape import Landscape
from elsteer.models import fingerprint
from elsteer.prompts import Prompt, check_apart, load_suite, suite_name
from elsteer.run import RunFolder, key_of, told_apart
from elsteer.settings import FitSettings, TuningSettings
from elsteer.steering.attach import Steering
from elsteer.steering.evidence import Evidence
from elsteer.steering.methods.baseline import Candidate
from elsteer.steering.methods.baselines import BASELINES
from elsteer.training import shuffled_control
from elsteer.tuning import Trial, Tuner, read_trials

__all__ = ["PLAIN", "check_methods", "compare", "finished_fit", "known_methods"]

PLAIN = "none"
Progress = Callable[[str, int, int], None]
Bools = NDArray[np.bool_]


class _Attaches(Protocol):
    def attach(self, model: PreTrainedModel) -> AbstractContextManager[Steering | None]: ...


@dataclass
class _Scaled:
    """A landscape at a strength of its own."""

    landscape: Landscape
    strength: float

    def attach(self, model: PreTrainedModel) -> AbstractContextManager[Steering | None]:
        return self.landscape.attach(model, self.strength * self.landscape.rule.strength)


def known_methods() -> list[str]:
    """Names that `compare` takes, besides the plain model's, which always takes part."""
    return ["els", *CONTROLS, *(name for name in BASELINES if name not in (PLAIN, *CONTROLS))]


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    run_dir: str | Path,
    methods: Sequence[str],
    suites: Sequence[str],
    *,
    out: str | Path | None = None,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    judge: str = "rules",
    strengths: Sequence[float] = (1.0,),
    budget: int = BUDGET,
    finalists: int = FINALISTS,
    max_new_tokens: int = 48,
    batch_size: int = 64,
    progress: Progress | None = None,
    command: str = "",
) -> ComparisonResult:
    """Tune and measure `methods` beside the plain model.

    run_dir: of a finished fit for this model. methods: of `known_methods()`. suites: as for `evaluate`. out: the folder for all
    files, RUN_DIR/compare by default. limit: prompts of a suite at most. strengths: each method is measured at its tuned
    strength times each of these; the figures are of 1. budget, finalists: candidates screened, and judged in full.
    Started again, it goes on where it was. Raises RunError, PromptError, LandscapeError in one sentence.
    """
    folder = expanded(out if out is not None else Path(run_dir) / "compare")
    work = _Work(model, tokenizer, RunFolder(run_dir), seed, judge, max_new_tokens, batch_size, progress, folder)
    names = check_methods(methods)
    if not suites:
        raise PromptError("Give at least one suite to compare on, such as 'xstest', or a file of prompts.")
    slugs = [suite_name(name) for name in suites]
    check_apart(slugs)
    data = Path(data_dir) if data_dir is not None else None
    prompts = {
        slug: told_apart(load_suite(name, data_dir=data, limit=limit, seed=seed))
        for slug, name in zip(slugs, suites, strict=True)
    }
    work.start()
    into = RunFolder(folder)
    into.refuse_others(("compare.md", "compare.json", "frontier.png"), ("rows",))
    with into.owned():
        chosen = {name: work.choose(name, budget, finalists) for name in names}
        labels = work.measure(prompts, chosen, strengths)
        return _result(work, names, chosen, prompts, labels, strengths, command)


def finished_fit(run_dir: str | Path) -> tuple[FitSettings, Landscape]:
    """The settings and the landscape of a run folder. Raises RunError where it has none yet."""
    run = expanded(run_dir)
    if not (run / "settings.yaml").exists() or not (run / "landscape").is_dir():
        raise RunError(
            f"{run} holds no finished fit (settings.yaml and landscape): run `elsteer fit` with --run-dir {run} first."
        )
    settings = FitSettings.read(run / "settings.yaml")
    return settings, Landscape.from_pretrained(run / "landscape")


def check_methods(methods: Sequence[str]) -> list[str]:
    """`methods` without the plain model. Raises PromptError for one that is not known, or given twice."""
    names = [name for name in methods if name != PLAIN]
    known = known_methods()
    if unknown := [name for name in names if name not in known]:
        raise PromptError(f"There is no method {unknown[0]!r}: known are {', '.join(known)}.")
    if twice := [name for name in names if names.count(name) > 1]:
        raise PromptError(f"The method {twice[0]} is given twice: name each once.")
    if not names:
        raise PromptError(f"Give at least one method to compare with the plain model: {', '.join(known)}.")
    return names


@dataclass
class _Chosen:
    """One method as it will be measured."""

    settings: dict[str, Any]
    feasible: bool
    system: str | None
    at: Callable[[float], _Attaches]
    dev: Trial | None
    trials: list[Trial]


@dataclass
class _Work:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    run: RunFolder
    seed: int
    judge: str
    max_new_tokens: int
    batch_size: int
    progress: Progress | None
    folder: Path  # for all files
    _tuner: Tuner | None = None
    _evidence: Evidence | None = None

    def start(self) -> None:
        """Read what the fit left behind, and check that it is of this model."""
        self.settings, self.landscape = finished_fit(self.run.path)
        self.landscape.attach(self.model, 0.0, tokenizer=self.tokenizer).remove()
        now = fingerprint(self.model, self.tokenizer, thinking=self.settings.collect.thinking)
        self.key = key_of(
            now.named_as(self.landscape.fingerprint.name).to_dict(),
            str(self.model.dtype),
            self.settings.collect.system,
            self.max_new_tokens,
            judge_of_fit(self.judge).name,
        )

    def caches(self, prompts: Sequence[Prompt], system: str | None = None) -> PromptCaches:
        """Of prompts as the fit asked them, with a further system prompt where a method has one."""
        collect = self.settings.collect
        parts = [one for one in (collect.system, system) if one]
        room = max(self.max_new_tokens, self.settings.tuning.tokens, self.settings.tuning.quality_tokens)
        return PromptCaches(
            self.model,
            self.tokenizer,
            prompts,
            batch_size=self.batch_size,
            system="\n\n".join(parts) or None,
            thinking=collect.thinking,
            room=room,
            folder=self.folder,
        )

    @property
    def tuning(self) -> TuningSettings:
        """How baselines are tuned: as the fit was, but that they need only keep safety, up to a point, and not raise it."""
        fitted = self.settings.tuning
        return fitted.model_copy(update={"safety_margin": min(-0.01, fitted.safety_margin)})

    @property
    def tuner(self) -> Tuner:
        """The fit's tuner over its dev prompts; what baselines share."""
        if self._tuner is None:
            self.dev = self.run.prompts("dev")
            known = read_completions(self.run / "dev.jsonl", {"tokens_at_most": self.settings.tuning.tokens})
            if missing := [one.id for one in self.dev if one.id not in known]:
                raise RunError(
                    f"{self.run.path} lacks the answers of {len(missing)} dev prompts: run the fit to its end first."
                )
            self.neutral = self.run.prompts("neutral") or neutral_prompts(self.settings)  # older folders lack them
            self._tuner = Tuner(
                {},
                self.caches(self.dev),
                [known[one.id] for one in self.dev],
                self.caches(self.neutral),
                judge_of_fit(self.settings.collect.judge),
                None,
                self.tuning,
                self.run / "no-trials.jsonl",
                self.progress,
            )
        return self._tuner

    @property
    def evidence(self) -> Evidence:
        if self._evidence is None:
            self._evidence = Evidence.of_run(self.run.path)
        return self._evidence

    def choose(self, name: str, budget: int, finalists: int) -> _Chosen:
        """The method, tuned. `els` was tuned by the fit."""
        if name == "els" or name in CONTROLS:
            found = self.landscape
            if name == "random":
                found = found.with_method("random")
            elif name == "shuffled":
                found = shuffled_control(self.run.path, found, self.progress)
            trials = list(read_trials(self.run / "frontier.jsonl").values())
            rule = found.rule.to_dict()
            feasible = name == "els" and found.rule.strength > 0
            return _Chosen(rule, feasible, None, lambda by: _Scaled(found, by), None, trials if name == "els" else [])
        path = self.folder / f"frontier.{name}.jsonl"
        progress = self.progress

        def told(stage: str, done: int, total: int) -> None:
            if progress is not None:
                progress(f"{name}: {stage}", done, total)

        self.tuner.progress = told
        tuned: Tuned = tune_baseline(
            self.tuner,
            BASELINES[name].candidates(self.evidence),
            path,
            budget=budget,
            finalists=finalists,
            with_system=lambda system: (self.caches(self.dev, system), self.caches(self.neutral, system)),
            made=key_of(
                self.key,
                self._made(name),
                self.tuning.measuring(),
                [(one.id, one.source) for one in (*self.dev, *self.neutral)],
                self.tuner.judge.name,
                "strengths around the best",
            ),
        )
        candidate: Candidate = tuned.candidate
        settings = {**candidate.settings, "strength": candidate.strength}
        return _Chosen(settings, tuned.feasible, candidate.system, candidate.scaled, tuned.trial, tuned.trials)

    def measure(
        self,
        prompts: dict[str, list[Prompt]],
        chosen: dict[str, _Chosen],
        strengths: Sequence[float],
    ) -> dict[tuple[str, str, float], list[str]]:
        """Labels by suite, method and strength, in the prompts' order; those of the plain model at strength 0."""
        if self._tuner is not None:  # its prompts are done with
            self._tuner.dev.forget()
            self._tuner.neutral.forget()
        found: dict[tuple[str, str, float], list[str]] = {}
        wanted = sorted({1.0, *strengths})
        for suite, rows in prompts.items():
            caches = self.caches(rows)
            found[suite, PLAIN, 0.0] = self._answer(suite, PLAIN, 0.0, {}, caches, None)
            for name, one in chosen.items():
                mine = caches if one.system is None else self.caches(rows, one.system)
                for strength in wanted if one.system is None else [1.0]:
                    found[suite, name, strength] = self._answer(
                        suite, name, strength, _asked(one), mine, one.at(strength)
                    )
        return found

    def _answer(
        self,
        suite: str,
        name: str,
        strength: float,
        settings: dict[str, Any],
        caches: PromptCaches,
        attaches: _Attaches | None,
    ) -> list[str]:
        extra = {
            "suite": suite,
            "method": name,
            "strength": strength,
            "key": key_of(self.key, settings, self._made(name)),
        }

        def told(done: int, total: int) -> None:
            if self.progress is not None:
                self.progress(f"{suite}, {'plain' if name == PLAIN else name}", done, total)

        def run(steering: Steering | None) -> list[Completion]:
            return complete(
                caches,
                judge_of_fit(self.judge),
                max_new_tokens=self.max_new_tokens,
                steering=steering,
                path=self.folder / f"rows/{suite}.{name}.{strength:g}.jsonl",
                extra=extra,
                describe=lambda one: {"prompt": one.text, "harmful": one.harmful, "source": one.source},
                progress=told,
            )

        if attaches is None:
            return [one.label for one in run(None)]
        with attaches.attach(self.model) as steering:
            return [one.label for one in run(steering)]

    def _made(self, name: str) -> str:
        """What a method has learned from: another landscape, or other evidence, under the same settings makes other rows."""
        if name == "shuffled":  # it is trained on what the fit's prompts were answered
            return key_of(self.landscape.digest(), self.evidence.digest())
        if name in ("els", *CONTROLS):
            return self.landscape.digest()
        if not BASELINES[name].learns:
            return ""
        version = BASELINES[name].version
        return self.evidence.digest() + (f" {version}" if version > 1 else "")


def _asked(one: _Chosen) -> dict[str, Any]:
    """What makes a method's answers: its settings, and the text of its system prompt."""
    return one.settings if one.system is None else {**one.settings, "system": one.system}


def part_of(suite: str, harmful: bool, both: bool) -> str:
    """The name of the benign or harmful part of a suite in figures: xstest_safe, or_bench_hard, harmbench.dan."""
    slug = suite.replace("-", "_").replace("+", ".")
    if not both:
        return slug
    if slug == "xstest":
        return f"{slug}_{'unsafe' if harmful else 'safe'}"
    return f"{slug}_{'harmful' if harmful else 'benign'}"


def _parts(prompts: dict[str, list[Prompt]]) -> list[tuple[str, str, bool, list[int]]]:
    """(suite, part, harmful, places) of every part that has prompts."""
    found = []
    for suite, rows in prompts.items():
        kinds = {one.harmful for one in rows}
        for harmful in sorted(kinds):
            places = [at for at, one in enumerate(rows) if one.harmful == harmful]
            found.append((suite, part_of(suite, harmful, len(kinds) == 2), harmful, places))
    return found


def _result(
    work: _Work,
    names: list[str],
    chosen: dict[str, _Chosen],
    prompts: dict[str, list[Prompt]],
    labels: dict[tuple[str, str, float], list[str]],
    strengths: Sequence[float],
    command: str,
) -> ComparisonResult:
    parts, folder = _parts(prompts), work.folder

    def refused(harmful: bool, only: str | None, *runs: tuple[str, float]) -> list[Bools]:
        """Refusals of each of `runs` (method, strength) over the prompts that were scored in all of them."""
        rows = [
            [labels[suite, *one][place] for one in runs]
            for suite, part, kind, places in parts
            if kind == harmful and only in (None, part)
            for place in places
        ]
        kept = [row for row in rows if "unscored" not in row]
        return [np.array([row[at] == "refusal" for row in kept], dtype=bool) for at in range(len(runs))]

    plain = PLAIN, 0.0
    rates: dict[bool, dict[str, Interval]] = {False: {}, True: {}}
    for harmful, into in rates.items():
        for part in [part for _, part, kind, _ in parts if kind == harmful]:
            into[part] = _rate(refused(harmful, part, plain)[0])
        into["all"] = _rate(refused(harmful, None, plain)[0])
    found: dict[str, ComparedMethod] = {}
    changed: list[float] = []
    for name in names:
        mine = name, 1.0
        method = ComparedMethod(name, chosen[name].settings, chosen[name].feasible, chosen[name].dev)
        for harmful in (False, True):
            into = method.harmful_refused if harmful else method.benign_refused
            for part in rates[harmful]:
                before, after = refused(harmful, None if part == "all" else part, plain, mine)
                into[part] = _rate(after)
                if harmful:
                    method.harmful_difference[part] = paired_difference(before, after)
                else:
                    method.removed[part] = removed(before, after, work.seed)
        before, after = refused(False, None, plain, mine)
        method.p_value = mcnemar_exact(int((before & ~after).sum()), int((~before & after).sum()))
        method.unscored = sum(label == "unscored" for suite in prompts for label in labels[suite, *mine])
        if "els" in names and name != "els":
            for part in rates[False]:
                before, els, after = refused(False, None if part == "all" else part, plain, ("els", 1.0), mine)
                method.ahead[part] = removed_difference(before, els, after, work.seed)
        before, after = refused(True, None, plain, mine)
        changed += [float((before != after).mean())] if len(before) else []
        found[name] = method
    for method, p in zip(found.values(), holm([one.p_value for one in found.values()]), strict=True):
        method.p_value = p
    n = rates[True]["all"].n
    detectable = detectable_difference(n, max(0.02, float(np.median(changed)))) if changed else math.nan
    result = ComparisonResult(found, rates[False], rates[True], detectable, sentence(found, rates), folder)
    write_figures(folder / "compare.json", _figures(work, result, command), only=True)  # none of other methods stays
    page = markdown(result, list(prompts))
    write_atomic(folder / "compare.md", lambda to: to.write_text(page, encoding="utf-8"))
    spots = [
        Spot(name, at, _rate(refused(False, None, (name, at))[0]), _rate(refused(True, None, (name, at))[0]), at == 1.0)
        for name in names
        for at in sorted({1.0, *strengths})
        if (next(iter(prompts)), name, at) in labels
    ]
    dev = {name: [one for one in chosen[name].trials if one.stage != "screening"] for name in names}
    picture = comparison_picture(spots, (rates[False]["all"], rates[True]["all"]), dev)
    write_atomic(folder / "frontier.png", lambda to: to.write_bytes(picture))
    return result


def _rate(refusals: Bools) -> Interval:
    return wilson(int(refusals.sum()), len(refusals))


def _figures(work: _Work, result: ComparisonResult, command: str) -> list[Figure]:
    model = f"{work.landscape.fingerprint.name or 'a model'}, {str(work.model.dtype).removeprefix('torch.')}"
    rows: list[tuple[str, Interval, str | None]] = []
    for part, rate in (*result.plain_benign.items(), *result.plain_harmful.items()):
        if part != "all":
            rows.append((f"plain_refused.{part}", rate, None))
    for name, one in result.methods.items():
        note = None if one.feasible or name in CONTROLS else "constraints not met on dev"
        rows += [(f"{name}.removed.{part}", value, note) for part, value in one.removed.items() if part != "all"]
        rows.append((f"{name}.removed", one.removed["all"], note))
        rows += [
            (f"{name}.harmful_difference.{part}", value, note)
            for part, value in one.harmful_difference.items()
            if part != "all"
        ]
        rows.append((f"{name}.harmful_difference", one.harmful_difference["all"], note))
        rows += [
            (
                f"{name}.behind_els{'' if part == 'all' else f'.{part}'}",
                value,
                "share removed by els less that of this method",
            )
            for part, value in one.ahead.items()
        ]
    return [
        Figure.of(name, value, command, work.seed, model, machine(), note=note)
        for name, value, note in rows
        if value.defined
    ]
