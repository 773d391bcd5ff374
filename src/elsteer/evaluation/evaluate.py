"""`evaluate`: plain against steered on the same prompts, every row kept, resumable, with a report.

Files in the run folder: evaluation/NAME.METHOD.jsonl (a row a prompt), evaluation/answers.NAME.METHOD.KEY.jsonl
(full-length answers for the quality measures), evaluation/harm.NAME.METHOD.KEY.jsonl, evaluation/summary.json, report.html.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elsteer.completions import Completion, PromptCaches, complete
from elsteer.decoding import decode
from elsteer.errors import PromptError
from elsteer.evaluation.correction import accuracies_of
from elsteer.evaluation.plots import before_after_picture, landscape_picture
from elsteer.evaluation.quality import Answer, Quality, answer_at_length, quality
from elsteer.evaluation.report import Example, ReportData, verdict_sentence, write_report
from elsteer.evaluation.statistics import Interval, JudgeAccuracy, mean_bootstrap, paired_difference, wilson
from elsteer.evaluation.tables import Comparison, compare_all, percent
from elsteer.files import append_jsonl, read_json, read_rows, write_atomic, write_json
from elsteer.judges import Judge, get_judge, outcome_of, require_harm
from elsteer.landscape import Landscape, holds
from elsteer.models import decoder_blocks
from elsteer.prompts import Prompt, check_apart, load_suite, suite_name
from elsteer.run import RunFolder, key_of, told_apart, without_nan
from elsteer.states import watch_states

__all__ = ["Evaluation", "Harm", "evaluate"]

logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
Method = Landscape | Literal["none"]
PLAIN = "none"
_EXAMPLES = 12
_KEEP_BYTES = 4 << 30  # of the caches of all suites


@dataclass(frozen=True)
class Harm:
    """How harmful the answers to harmful prompts are, 0 to 1 in the judge's own measure: means, and their paired difference."""

    plain: Interval
    steered: Interval
    difference: Interval


@dataclass
class Evaluation:
    """What an evaluation found.

    rows: as in `elsteer.evaluation.tables`; tables: method to its tables ("total", "suite", "source", "category").
    answers: method to prompt id to full-length answer; quality_of: the first landscape's. seconds: by stage. report: report.html.
    judge_accuracy: what the corrected rates rest on, the first. harm: by method, where it was asked for. seen: prompts that
    one of the landscapes was fitted or tuned on, where its fit is in the run folder.
    """

    rows: list[dict[str, Any]]
    tables: dict[str, dict[str, list[Comparison]]]
    quality_of: dict[str, Quality]
    perplexity: dict[str, Interval]
    examples: list[Example]
    seconds: dict[str, float]
    report: Path
    answers: dict[str, dict[str, Answer]] = field(default_factory=dict)
    judge_accuracy: list[JudgeAccuracy] = field(default_factory=list)
    harm: dict[str, Harm] = field(default_factory=dict)
    seen: int = 0

    @property
    def method(self) -> str:
        """The first method that is not the plain model: what the report is about."""
        return next(iter(self.tables))

    def comparisons(self, method: str | None = None) -> dict[str, list[Comparison]]:
        """The tables of `method` (the first one by default)."""
        return self.tables[method or self.method]

    @property
    def quality(self) -> Quality | None:
        """Of the first method; None where it was not measured."""
        return self.quality_of.get(self.method)

    @property
    def sentence(self) -> str:
        """The verdict in plain words."""
        tables = self.comparisons()
        return " ".join([verdict_sentence(tables["total"], tables["suite"]), *_seen_words(self.seen)])


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    methods: Sequence[Method] | Mapping[str, Landscape],
    suites: Sequence[str],
    *,
    run_dir: str | Path,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    judge: str | Judge = "rules",
    judge_labels: Sequence[str | Path] = (),
    harm: bool = False,
    quality: bool = True,
    quality_prompts: int = 200,
    quality_tokens: int = 64,
    max_new_tokens: int = 48,
    batch_size: int = 64,
    progress: Progress | None = None,
    command: str = "",
    split: str = "test",
) -> Evaluation:
    """Answer the prompts of `suites` with the plain model and each landscape of `methods`, judge, compare and report.

    judge: a name, or a judge of one's own. judge_labels: files of answers that people labelled, on which the judge is measured
    first; rates are corrected by the first of them, those of `rules` by what is known of it. harm: also ask the judge how
    harmful the answers to harmful prompts are (`api` and `local` can tell).
    methods: landscapes, each called by its method, or by names of their own choosing: {"els": ..., "els at 0.5": ...}.
    The plain model ("none") always takes part. limit: prompts of a suite at most, drawn by seed. quality: also answer at
    full length up to `quality_prompts` benign prompts that the plain model answers, and compare perplexity under the plain
    model. Verdicts stop an answer early, at `max_new_tokens` at most. Started again, it goes on where it was.
    Raises PromptError for an unknown suite, LandscapeError where a landscape does not fit the model.
    """
    run = RunFolder(run_dir)
    landscapes = _named(methods)
    if not suites:
        raise PromptError("Give at least one suite to evaluate on, such as 'starter', or a file of prompts.")
    names = [suite_name(name) for name in suites]
    check_apart(names)
    run.refuse_others(("report.html", "before_after.png"), ("evaluation", "stages.json"))
    with run.owned():
        judging = get_judge(judge)
        if harm:
            require_harm(judging)
        accuracy = accuracies_of(judging, [Path(file) for file in judge_labels], run / "evaluation/labels.jsonl")
        for one in landscapes.values():  # whether it fits is said now, not after the plain answers
            one.attach(model, 0.0, tokenizer=tokenizer).remove()
        first = next(iter(landscapes.values()))
        work = _Work(
            model,
            tokenizer,
            judging,
            run,
            seed,
            max_new_tokens,
            quality_tokens,
            batch_size,
            first,
            progress,
            harm=harm,
            suites=len(names),
        )
        folder = Path(data_dir) if data_dir is not None else None
        prompts_of = [load_suite(name, data_dir=folder, limit=limit, seed=seed) for name in suites]
        for name, prompts in zip(names, prompts_of, strict=True):
            work.run_suite(name, told_apart(prompts), landscapes)
        main = dict([next(iter(landscapes.items()))])
        measured = work.measure_quality(main, quality_prompts, quality_tokens) if quality else {}
        harms = {name: work.measure_harm(name, one) for name, one in landscapes.items()} if harm else {}
        return work.report(landscapes, measured, accuracy, harms, command, split, list(suites))


def _named(methods: Sequence[Method] | Mapping[str, Landscape]) -> dict[str, Landscape]:
    """The landscapes by name. Raises PromptError where there is none, a name twice, or one that cannot be a file's."""
    by_name = isinstance(methods, Mapping)
    pairs: list[tuple[str, Method]] = (
        list(methods.items())
        if isinstance(methods, Mapping)
        else [(getattr(one, "method", ""), one) for one in methods if one != PLAIN]
    )
    found = {name: one for name, one in pairs if isinstance(one, Landscape)}
    if unknown := [one for _, one in pairs if not isinstance(one, Landscape)]:
        raise PromptError(
            f"The method {unknown[0]!r} is no landscape: give one, such as landscape.with_method('random')."
        )
    if not found or len(found) < len(pairs):
        raise PromptError(
            "Give at least one landscape to evaluate, and each method once; of one method several by names of your own: "
            "{'els': ..., 'els, half': ...}."
        )
    if unfit := [name for name in found if by_name and (name == PLAIN or not re.fullmatch(r"\w[\w ,+-]*", name))]:
        raise PromptError(
            f"A method cannot be called {unfit[0]!r}: use letters, digits, spaces and , + - _ in its name."
        )
    return found


@dataclass
class _Work:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    judge: Judge
    run: RunFolder
    seed: int
    max_new_tokens: int
    quality_tokens: int
    batch_size: int
    first: Landscape
    progress: Progress | None
    harm: bool = False
    suites: int = 1
    rows: list[dict[str, Any]] = field(default_factory=list)
    caches: dict[str, PromptCaches] = field(default_factory=dict)
    plain: dict[str, list[Completion]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    answers: dict[str, dict[str, Answer]] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether answers go on where their verdict is clear: how harmful one is, is told of the whole of it."""
        return self.harm and getattr(self.judge, "early", True)

    def run_suite(self, suite: str, prompts: list[Prompt], landscapes: dict[str, Landscape]) -> None:
        caches = PromptCaches(
            self.model,
            self.tokenizer,
            prompts,
            batch_size=self.batch_size,
            system=self.first.asked_with.get("system"),
            thinking=self.first.asked_with.get("thinking"),
            room=max(self.max_new_tokens, self.quality_tokens),
            keep_bytes=_KEEP_BYTES // self.suites,
        )
        self.caches[suite] = caches
        self.plain[suite] = self._answer(suite, caches, PLAIN, None)
        for name, landscape in landscapes.items():
            self._answer(suite, caches, name, landscape)

    def _answer(self, suite: str, caches: PromptCaches, method: str, landscape: Landscape | None) -> list[Completion]:
        strength = 0.0 if landscape is None else landscape.rule.strength
        mark = {
            "suite": suite,
            "method": method,
            "strength": strength,
            "tokens_at_most": self.max_new_tokens,
            "key": self._key(landscape),
        }
        if self.whole:
            mark["whole"] = True

        def describe(prompt: Prompt) -> dict[str, Any]:
            return {
                "prompt": prompt.text,
                "harmful": prompt.harmful,
                "source": prompt.source,
                "category": prompt.category,
            }

        def told(done: int, total: int) -> None:
            if self.progress is not None:
                self.progress(f"{suite}, {'plain' if landscape is None else method}", done, total)

        path = self.run / f"evaluation/{suite}.{method}.jsonl"
        before = time.perf_counter()

        def answered(steering: Any) -> list[Completion]:
            return complete(
                caches,
                self.judge,
                max_new_tokens=self.max_new_tokens,
                early_stop=not self.whole,
                steering=steering,
                path=path,
                extra=mark,
                describe=describe,
                progress=told,
            )

        if landscape is None:
            found = answered(None)
        else:
            with landscape.attach(self.model, tokenizer=self.tokenizer) as steering:
                found = answered(steering)
        self.seconds[f"{suite}, {method}"] = time.perf_counter() - before
        for prompt, one in zip(caches.prompts, found, strict=True):
            row = {**mark, **describe(prompt), **dataclasses.asdict(one), "completion": one.text}
            self.rows.append(row)
        return found

    def _key(self, landscape: Landscape | None) -> str:
        """What the rows rest on: other energies, another rule or another model make other rows."""
        energies = None if landscape is None else landscape.digest()
        rule = None if landscape is None else landscape.rule.to_dict()
        parts = [self.first.fingerprint.to_dict(), rule, energies, str(self.model.dtype), self.judge.name]
        if system := self.first.asked_with.get("system"):
            parts.append(system)
        if landscape is not None and landscape.method != "els":
            parts.append(f"method {landscape.method}")
        return key_of(*parts)

    def measure_quality(
        self, landscapes: dict[str, Landscape], limit: int, tokens: int
    ) -> dict[str, tuple[Quality, Interval]]:
        chosen = {
            suite: [
                at
                for at, one in enumerate(self.plain[suite])
                if one.label == "compliance" and not caches.prompts[at].harmful
            ]
            for suite, caches in self.caches.items()
        }
        share = max(1, limit // max(1, sum(bool(places) for places in chosen.values())))
        chosen = {suite: _spread(places, share) for suite, places in chosen.items()}
        if not any(chosen.values()):
            return {}
        ids = [self.caches[suite].prompts[at].id for suite, places in chosen.items() for at in places]
        self.answers[PLAIN] = self._at_length(chosen, PLAIN, None, tokens)
        found: dict[str, tuple[Quality, Interval]] = {}
        for name, landscape in landscapes.items():
            with landscape.attach(self.model, tokenizer=self.tokenizer) as steering:
                after = self.answers[name] = self._at_length(chosen, name, steering, tokens, landscape)
            logs = [after[one].nll - self.answers[PLAIN][one].nll for one in ids]
            ratio = mean_bootstrap([x for x in logs if math.isfinite(x)], seed=self.seed).map(math.exp)
            found[name] = quality(self.answers[PLAIN], after, ids), ratio
        return found

    def _at_length(
        self,
        chosen: dict[str, list[int]],
        method: str,
        steering: Any,
        tokens: int,
        landscape: Landscape | None = None,
    ) -> dict[str, Answer]:
        answers: dict[str, Answer] = {}
        for suite, places in chosen.items():
            key = key_of(self._key(landscape), tokens)
            path = self.run / f"evaluation/answers.{suite}.{method}.{key}.jsonl"

            def told(done: int, total: int, suite: str = suite) -> None:
                if self.progress is not None:
                    self.progress(f"{suite}, whole answers, {'plain' if steering is None else method}", done, total)

            answers |= answer_at_length(
                self.caches[suite], places, method, steering=steering, max_new_tokens=tokens, path=path, progress=told
            )
        return answers

    def measure_harm(self, method: str, landscape: Landscape) -> Harm:
        """How harmful the answers to harmful prompts are, of those whose plain and steered answer the judge could read."""
        plain, steered = self._harms(PLAIN, None), self._harms(method, landscape)
        pairs = [(plain[key], steered[key]) for key in plain if plain[key] is not None and steered.get(key) is not None]
        before, after = (np.array([pair[at] for pair in pairs], dtype=float) for at in (0, 1))
        if np.isin([before, after], (0, 1)).all():  # of a yes or no the intervals are those of rates
            rates = [wilson(int(values.sum()), len(values)) for values in (before, after)]
            return Harm(rates[0], rates[1], paired_difference(before == 1, after == 1))
        return Harm(*(mean_bootstrap(values, seed=self.seed) for values in (before, after, after - before)))

    def _harms(self, method: str, landscape: Landscape | None) -> dict[tuple[str, str], float | None]:
        """By suite and prompt id. What a file has already is not asked again."""
        found: dict[tuple[str, str], float | None] = {}
        for suite in self.caches:
            rows = [row for row in self.rows if row["harmful"] and (row["suite"], row["method"]) == (suite, method)]
            key = key_of(self._key(landscape), self.max_new_tokens, *(["whole"] if self.whole else []))
            path = self.run / f"evaluation/harm.{suite}.{method}.{key}.jsonl"
            known = dict(read_rows(path, lambda row: (row["prompt_id"], row["harm"])))
            rest = [row for row in rows if row["prompt_id"] not in known]
            for start in range(0, len(rest), self.batch_size):
                some = rest[start : start + self.batch_size]
                told = self.judge.harms([row["prompt"] for row in some], [row["completion"] for row in some])  # type: ignore[attr-defined]
                fresh = dict(zip((row["prompt_id"] for row in some), told, strict=True))
                append_jsonl(path, [{"prompt_id": one, "harm": harm} for one, harm in fresh.items()])
                known |= fresh
                if self.progress is not None:
                    name = "plain" if method == PLAIN else method
                    self.progress(f"{suite}, harm of answers, {name}", start + len(some), len(rest))
            found |= {(suite, row["prompt_id"]): known[row["prompt_id"]] for row in rows}
        return found

    def _seen(self) -> int:
        """How many of the prompts the fit in this run folder was fitted or tuned on."""
        path = self.run / "prompts.jsonl"
        fitted = set(read_rows(path, lambda row: row["messages"][-1]["content"])) if path.exists() else set()
        return len({row["prompt"] for row in self.rows} & fitted)

    def report(
        self,
        landscapes: dict[str, Landscape],
        measured: dict[str, tuple[Quality, Interval]],
        accuracy: list[JudgeAccuracy],
        harms: dict[str, Harm],
        command: str,
        split: str,
        suites: list[str],
    ) -> Evaluation:
        fitted, frontier = holds(self.run.path, landscapes.values()), self.run / "frontier.png"
        seen = self._seen() if fitted else 0
        corrects = accuracy[0] if accuracy else None
        tables = {name: compare_all(self.rows, name, judge=corrects, seed=self.seed) for name in landscapes}
        main = next(iter(landscapes))
        examples = self._examples(main)
        path = self.run / "report.html"
        pictures = self._pictures(landscapes[main])
        before_after = None
        if any(one.n for one in tables[main]["suite"]):
            before_after = before_after_picture(tables[main]["suite"], "Refused, plain and steered")
            _write_bytes(self.run / "before_after.png", before_after)
        write_report(
            path,
            ReportData(
                title="elsteer: plain against steered",
                model=self.first.fingerprint.name or "",
                method=main,
                command=command,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                seed=self.seed,
                split=f"{split} ({', '.join(suites)})",
                judge=self.judge.name,
                judge_accuracy=accuracy,
                comparisons=tables[main],
                controls={name: found["total"] for name, found in tables.items() if name != main},
                landscape={name: str(value) for name, value in landscapes[main].rule.to_dict().items()},
                quality=_quality_words(measured.get(main)) | _harm_words(harms.get(main)),
                before_after_png=before_after,
                frontier_png=frontier.read_bytes() if fitted and frontier.is_file() else None,
                landscape_pngs=pictures,
                examples=examples,
                warnings=_seen_words(seen),
                timings=self.seconds,
                provenance={
                    "dtype": str(self.model.dtype),
                    "landscape created": str(landscapes[main].provenance.get("created")),
                },
            ),
        )
        summary = {
            name: {group: [dataclasses.asdict(one) for one in found] for group, found in table.items()}
            for name, table in tables.items()
        }
        write_json(self.run / "evaluation/summary.json", without_nan(summary))
        if harms:
            told = {name: dataclasses.asdict(one) for name, one in harms.items()}
            write_json(self.run / "evaluation/harm.json", without_nan(told))
        return Evaluation(
            self.rows,
            tables,
            {name: found[0] for name, found in measured.items()},
            {name: found[1] for name, found in measured.items()},
            examples,
            self.seconds,
            path,
            self.answers,
            accuracy,
            harms,
            seen,
        )

    def _examples(self, method: str) -> list[Example]:
        """Changed answers first, at most a dozen benign and a dozen harmful, spread over the suites."""
        by_key = {(row["suite"], row["prompt_id"], row["method"]): row for row in self.rows}
        found: dict[bool, list[Example]] = {False: [], True: []}
        for row in self.rows:
            if row["method"] != PLAIN:
                continue
            after = by_key[(row["suite"], row["prompt_id"], method)]
            if row["label"] == after["label"] or "unscored" in (row["label"], after["label"]):
                continue
            pair = (_shown(row), row["label"], _shown(after), after["label"])
            found[row["harmful"]].append(Example(row["prompt"], row["harmful"], *pair, row["suite"]))
        spread = []
        for harmful in (False, True):
            step = max(1, len(found[harmful]) // _EXAMPLES)
            spread += found[harmful][::step][:_EXAMPLES]
        return spread

    def _pictures(self, landscape: Landscape) -> dict[str, bytes]:
        """The energy landscape in a plane through the prompts' states at the middle steered layer.

        A picture that shows the same as the one of an earlier run is read again: it costs a pass over the prompts.
        """
        suite, caches = next(iter(self.caches.items()))
        layer = landscape.rule.layers[len(landscape.rule.layers) // 2]
        places = list(range(len(caches.prompts)))[:: max(1, len(caches.prompts) // 200)]
        known = {(row["suite"], row["prompt_id"]): row["label"] for row in self.rows if row["method"] == PLAIN}
        outcomes = [outcome_of(caches.prompts[at].harmful, known[(suite, caches.prompts[at].id)]) for at in places]
        kept = [i for i, one in enumerate(outcomes) if one is not None]
        if len(kept) < 8:
            return {}
        name, marks = f"landscape at layer {layer}", self.run / "evaluation/pictures.json"
        path = self.run / f"{_slug(name)}.png"
        key = key_of(self._key(landscape), [[caches.prompts[at].id, outcomes[i]] for i, at in enumerate(places)])
        if path.exists() and read_json(marks) == {path.name: key}:
            return {name: path.read_bytes()}
        states = _last_states(caches, places, layer)
        descent = landscape.descent(layer).cpu()
        wrong = [i for i in kept if outcomes[i] == "false_refusal"][:15]
        paths = descent.path(states[wrong]).transpose(0, 1) if wrong and landscape.rule.eta > 0 else None
        title = f"Energy of layer {layer}" + (", in the average context" if descent.context_blocks else "")
        try:
            picture = landscape_picture(
                states[kept], [str(outcomes[i]) for i in kept], descent.energy, paths, title=title
            )
        except ValueError as error:  # all states are the same, as in the first layer of most models
            logger.warning("no picture of layer %d: %s", layer, error)
            return {}
        _write_bytes(path, picture)
        write_json(marks, {path.name: key})
        return {name: picture}


def _last_states(caches: PromptCaches, places: Sequence[int], layer: int) -> Tensor:
    found: dict[int, Tensor] = {}
    for batch in caches.batches(places):
        with watch_states(decoder_blocks(caches.model)) as latest:
            decode(caches.model, batch, max_new_tokens=1, end_ids=set())
            state = latest[layer]
        assert state is not None
        found.update(zip(batch.rows, state.cpu(), strict=True))
    return torch.stack([found[place] for place in places])


def _shown(row: Mapping[str, Any]) -> str:
    """The answer as far as it was made; where the model had not come to its end, with dots."""
    return row["completion"] + ("" if row["finished"] else " …")


def _seen_words(seen: int) -> list[str]:
    if not seen:
        return []
    return [
        f"{seen} of the prompts {'was' if seen == 1 else 'were'} fitted or tuned on, so these figures say little of others."
    ]


def _quality_words(measured: tuple[Quality, Interval] | None) -> dict[str, str]:
    if measured is None:
        return {}
    found, ratio = measured
    if not ratio.defined:
        return {"perplexity of steered over plain answers": "not measured: no answer had a token"}
    return {
        "perplexity of steered over plain answers, under the plain model": (
            f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f}, {ratio.n} prompts that the plain model answers)"
        ),
        f"degenerate answers (empty, repetitive or garbled), of {found.n}": ", ".join(
            f"{name} {percent(wilson(round(share * found.n), found.n))}"
            for name, share in (("plain", found.degenerate_plain), ("steered", found.degenerate_steered))
        ),
    }


def _harm_words(found: Harm | None) -> dict[str, str]:
    if found is None:
        return {}
    if not found.difference.defined:
        return {"harm of the answers to harmful prompts": "not measured: the judge's words could not be read"}
    change = found.difference
    return {
        "harm of the answers to harmful prompts (0 to 1)": (
            f"plain {found.plain.value:.3f}, steered {found.steered.value:.3f}, difference {change.value:+.3f} "
            f"({change.low:+.3f} to {change.high:+.3f}, {change.n} prompts)"
        )
    }


def _slug(name: str) -> str:
    return name.replace(" ", "_")


def _write_bytes(path: Path, content: bytes) -> None:
    write_atomic(path, lambda to: to.write_bytes(content))


def _spread(places: list[int], count: int) -> list[int]:
    """`count` of them, evenly over their order: suites go kind by kind."""
    return places if len(places) <= count else [places[at * len(places) // count] for at in range(count)]
