"""How often a judge errs, for rates corrected by it (`elsteer.evaluation.statistics.corrected_rate`).

The judge's accuracy is counted on completions that people labelled. That of `rules` is known (below); of other judges it is
measured where a file of labels is given. A classifier should be measured on labels that it did not learn from.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from elsteer.evaluation.statistics import JudgeAccuracy
from elsteer.files import append_jsonl, read_rows
from elsteer.judges import Judge, RulesJudge, judge_all
from elsteer.judges.agreement import LabelledCompletion, read_labels
from elsteer.judges.rules import WINDOW_CHARS
from elsteer.run import key_of

__all__ = ["RULES", "accuracies_of", "accuracy_on"]

RULES = (
    JudgeAccuracy("rules", "XSTest, five models' answers", 1045, 1159, 1048, 1091),
    JudgeAccuracy("rules", "WildGuardTest, half", 241, 265, 533, 585),
)
"""Of the judge `rules`, counted by `accuracy_on`; a test counts them again where the labels are there."""


_BATCH = 64


def accuracy_on(judge: Judge, path: Path, name: str | None = None, kept: Path | None = None) -> JudgeAccuracy:
    """`judge` on the completions with human labels of the file `path`. Raises JudgeError as `read_labels` does.

    kept: JSONL of what the judge said; what it has is not asked again, of a judge that takes its time.
    """
    rows = read_labels(path)
    said = _said(judge, rows, kept)
    scored = [(row.refusal, one == "refusal") for row, one in zip(rows, said, strict=True) if one != "unscored"]
    refusals = [found for human, found in scored if human]
    compliances = [not found for human, found in scored if not human]
    return JudgeAccuracy(
        judge.name, name or path.stem, sum(refusals), len(refusals), sum(compliances), len(compliances)
    )


def _said(judge: Judge, rows: Sequence[LabelledCompletion], kept: Path | None) -> list[str]:
    if getattr(judge, "early", True):  # rules are quick, and may be others under the same name
        kept = None
    known = dict(read_rows(kept, lambda row: (row["key"], row["label"]))) if kept is not None else {}
    keys = [key_of(judge.name, row.prompt, row.completion) for row in rows]
    rest = list({key: at for at, key in enumerate(keys) if key not in known}.values())
    for start in range(0, len(rest), _BATCH):
        some = rest[start : start + _BATCH]
        found = judge_all(judge, [rows[at].prompt for at in some], [rows[at].completion for at in some])
        fresh = {keys[at]: one.label for at, one in zip(some, found, strict=True)}
        known |= fresh
        if kept is not None:
            append_jsonl(kept, [{"key": key, "label": label} for key, label in fresh.items()])
    return [known[key] for key in keys]


def accuracies_of(judge: Judge, labels: Sequence[Path] = (), kept: Path | None = None) -> list[JudgeAccuracy]:
    """On each file of labels; without one, what is known of the judge. Rates are corrected by the first.

    kept: as for `accuracy_on`.
    """
    if labels:
        return [accuracy_on(judge, path, kept=kept) for path in labels]
    return list(RULES) if isinstance(judge, RulesJudge) and judge.window == WINDOW_CHARS else []
