"""How well a judge agrees with human labels: accuracy, F1 and both error rates, overall and per model.

Files: JSONL or CSV, one completion a row, in any of these forms (other columns are ignored, and so are lines with #
before the header of a CSV file):

| completion | human label | from |
|---|---|---|
| `completion` | `label`: refusal, compliance (or true, false) | your own |
| `completion` | `human_label`: 1_full_compliance, 2_full_refusal, 3_partial_refusal | XSTest |
| `response` | `response_refusal_label`: refusal, compliance | WildGuardTest |
| `assistant_response` | `human_score`: 1 (refusal), 0 | PyRIT |

`prompt` (or `objective`) and `model` are read where they are there. A row without a label is left out. A partial
refusal counts as a refusal.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from elsteer.errors import JudgeError
from elsteer.files import expanded
from elsteer.judges.verdict import Judge
from elsteer.text import half_character

__all__ = ["Agreement", "EarlyDecisions", "LabelledCompletion", "agreement", "early_decisions", "read_labels"]

_FORMS = (
    ("completion", "label"),
    ("completion", "human_label"),
    ("response", "response_refusal_label"),
    ("assistant_response", "human_score"),
)
_LABELS = {
    **dict.fromkeys(("refusal", "2_full_refusal", "3_partial_refusal", "true", "1", "1.0"), True),
    **dict.fromkeys(("compliance", "1_full_compliance", "false", "0", "0.0"), False),
}


@dataclass(frozen=True, slots=True)
class LabelledCompletion:
    """A completion and whether humans call it a refusal."""

    prompt: str
    completion: str
    refusal: bool
    model: str


@dataclass(frozen=True, slots=True)
class Agreement:
    """A judge against the human labels of one model's completions, or of all (`model` is then "all").

    n: completions that the judge scored; unscored: those it did not, which are in no other number.
    accuracy: with its 95% Wilson interval [low, high].
    false_positive_rate: share of the humans' compliances that the judge calls refusals; false_negative_rate: share of
    the humans' refusals that it calls compliances; f1: of refusal. None where there is nothing to divide by.
    """

    model: str
    n: int
    accuracy: float | None
    low: float | None
    high: float | None
    f1: float | None
    false_positive_rate: float | None
    false_negative_rate: float | None
    unscored: int


@dataclass(frozen=True, slots=True)
class EarlyDecisions:
    """What stopping at a decision does to a judge's verdicts.

    n: completions; decided: share of them decided before their end; characters: the median length at the decision.
    compliance: how many were decided as compliance; differ: the share of these of which the judge says otherwise when
    it sees the whole; human_refusal: the share of these that humans call a refusal.
    refusal_differ: the same as `differ` for those decided as refusal; 0 for a judge whose refusals are final.
    """

    n: int
    decided: float
    characters: float
    compliance: int
    differ: float
    human_refusal: float
    refusal_differ: float


def agreement(judge: Judge, path: str | Path) -> list[Agreement]:
    """Judge every labelled completion of the file `path`: a row for all, then one per model if there are several.

    Raises JudgeError naming file and line for a missing, empty or unreadable file, unknown columns or an unknown label.
    """
    rows = read_labels(path)
    many = getattr(judge, "judge_many", None)
    prompts, texts = [row.prompt for row in rows], [row.completion for row in rows]
    found = (
        many(prompts, texts) if many is not None else [judge.judge(*pair) for pair in zip(prompts, texts, strict=True)]
    )
    said = [one.label for one in found]
    models = sorted({row.model for row in rows})
    result = [_agreement("all", [(row.refusal, label) for row, label in zip(rows, said, strict=True)])]
    if len(models) > 1:
        for model in models:
            pairs = [(row.refusal, label) for row, label in zip(rows, said, strict=True) if row.model == model]
            result.append(_agreement(model, pairs))
    return result


def _agreement(model: str, pairs: Sequence[tuple[bool, str]]) -> Agreement:
    scored = [(human, label == "refusal") for human, label in pairs if label != "unscored"]
    counts = {(h, j): scored.count((h, j)) for h, j in itertools.product((True, False), repeat=2)}
    right, n = counts[True, True] + counts[False, False], len(scored)
    low = high = None
    if n:
        interval = binomtest(right, n).proportion_ci(method="wilson")
        low, high = float(interval.low), float(interval.high)
    return Agreement(
        model=model,
        n=n,
        accuracy=_share(right, n),
        low=low,
        high=high,
        f1=_share(2 * counts[True, True], n - counts[False, False] + counts[True, True]),
        false_positive_rate=_share(counts[False, True], counts[False, True] + counts[False, False]),
        false_negative_rate=_share(counts[True, False], counts[True, False] + counts[True, True]),
        unscored=len(pairs) - n,
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def early_decisions(judge: Judge, path: str | Path, step: int = 10, longest: int = 400) -> EarlyDecisions:
    """Feed every completion of `path` to `judge.decided`, `step` more characters at a time up to `longest`.

    Raises as `agreement` does.
    """
    rows = read_labels(path)
    lengths: list[int] = []
    differ = {"refusal": 0, "compliance": 0}
    count = {"refusal": 0, "compliance": 0}
    human = 0
    for row in rows:
        for length in range(step, min(longest, len(row.completion) - 1) + 1, step):
            verdict = judge.decided(row.prompt, row.completion[:length])
            if verdict is None:
                continue
            if verdict.label != "unscored":
                lengths.append(length)
                count[verdict.label] += 1
                differ[verdict.label] += judge.judge(row.prompt, row.completion).label != verdict.label
                human += verdict.label == "compliance" and row.refusal
            break
    return EarlyDecisions(
        n=len(rows),
        decided=len(lengths) / len(rows),
        characters=sorted(lengths)[len(lengths) // 2] if lengths else 0,
        compliance=count["compliance"],
        differ=differ["compliance"] / max(1, count["compliance"]),
        human_refusal=human / max(1, count["compliance"]),
        refusal_differ=differ["refusal"] / max(1, count["refusal"]),
    )


def read_labels(path: str | Path) -> list[LabelledCompletion]:
    """The labelled completions of a file, in its order. Raises JudgeError as `agreement` does."""
    path = expanded(path)
    try:
        rows = [row for line, raw in _rows(path) if (row := _labelled(raw, f"{path}, line {line}")) is not None]
    except FileNotFoundError:
        raise JudgeError(
            f"There is no file {path}: give a JSONL or CSV file of completions with human labels."
        ) from None
    except IsADirectoryError:
        raise JudgeError(f"{path} is a folder: give one JSONL or CSV file of completions with human labels.") from None
    except UnicodeDecodeError as error:
        raise JudgeError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8.") from error
    except OSError as error:
        raise JudgeError(f"{path} could not be read: {error.strerror or error}.") from error
    if not rows:
        raise JudgeError(f"{path} holds no labelled completion: it needs a row with a completion and its label.")
    return rows


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix.lower() == ".csv":
            comments = 0
            first = ""
            for first in file:
                if not first.startswith("#"):
                    break
                comments += 1
            reader = csv.DictReader(itertools.chain([first], file), strict=True)
            try:
                for row in reader:
                    yield reader.line_num + comments, dict(row)
            except csv.Error as error:
                raise JudgeError(f"{path}, line {reader.line_num + comments} is not CSV: {error}.") from error
            return
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise JudgeError(f"{path}, line {number} is not JSON: each line must be one JSON object.") from error
            if not isinstance(row, dict):
                raise JudgeError(f"{path}, line {number} is not a JSON object: each line must be one JSON object.")
            yield number, row


def _labelled(row: dict[str, Any], where: str) -> LabelledCompletion | None:
    form = next(((text, label) for text, label in _FORMS if text in row and label in row), None)
    if form is None:
        wanted = ", ".join(f"{text} + {label}" for text, label in _FORMS)
        raise JudgeError(f"{where} has the columns {', '.join(map(str, row)) or '(none)'}: wanted one of {wanted}.")
    text, label = row[form[0]], row[form[1]]
    if label is None or label == "":
        return None
    refusal = _LABELS.get(str(label).strip().casefold())
    if refusal is None:
        raise JudgeError(f"{where} has {form[1]} {str(label)[:40]!r}: wanted one of {', '.join(_LABELS)}.")
    if text is not None and not isinstance(text, str):
        raise JudgeError(f"{where} has a {form[0]} that is not text.")
    prompt = str(row.get("prompt") or row.get("objective") or "")
    if half_character(prompt) or half_character(text or ""):  # no tokenizer takes it
        raise JudgeError(f"{where} holds half of a character (a lone surrogate): delete or mend it.")
    return LabelledCompletion(prompt=prompt, completion=text or "", refusal=refusal, model=str(row.get("model") or ""))
