"""Questions with a known right answer: `load_choices` (MMLU, ARC-Challenge, TruthfulQA MC1) and `load_facts`.

The benchmarks are not shipped. They are read from the data folder, where it holds them (capability/mmlu.jsonl,
capability/arc_challenge_test.jsonl, capability/truthfulqa_mc.json), and else from the hub at a pinned commit. The facts are
of our own writing and shipped beside this file.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from elsteer.errors import PromptError
from elsteer.prompts.folder import data_folder
from elsteer.prompts.hub import HubError, hub_rows
from elsteer.prompts.prompt import Prompt

__all__ = ["BENCHMARKS", "LETTERS", "Benchmark", "Choices", "Fact", "load_choices", "load_facts"]

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Where a multiple-choice benchmark is: file of the data folder; data set, configuration, split, commit of the hub.

    letters: the choices stand in the prompt, by letter; else each choice is an answer by itself.
    """

    name: str
    title: str
    file: str
    hub_id: str
    config: str
    split: str
    revision: str
    letters: bool


BENCHMARKS: dict[str, Benchmark] = {
    one.name: one
    for one in (
        Benchmark(
            name="mmlu",
            title="MMLU",
            file="mmlu.jsonl",
            hub_id="cais/mmlu",
            config="all",
            split="test",
            revision="c30699e8356da336a370243923dbaf21066bb9fe",
            letters=True,
        ),
        Benchmark(
            name="arc",
            title="ARC-Challenge",
            file="arc_challenge_test.jsonl",
            hub_id="allenai/ai2_arc",
            config="ARC-Challenge",
            split="test",
            revision="210d026faf9955653af8916fad021475a3f00453",
            letters=True,
        ),
        Benchmark(
            name="truthfulqa",
            title="TruthfulQA MC1",
            file="truthfulqa_mc.json",
            hub_id="truthfulqa/truthful_qa",
            config="multiple_choice",
            split="validation",
            revision="741b8276f2d1982aa3d5b832d3ee81ed3b896490",
            letters=False,
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Choices:
    """A question and its choices; `answer` is the place of the right one. subject: what it is about, or ""."""

    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str = ""
    letters: bool = True

    @property
    def prompt(self) -> Prompt:
        """The chat: the question and, with `letters`, its choices by letter."""
        if not self.letters:
            return Prompt.of(self.question, harmful=False, source="capability")
        about = f" about {self.subject}" if self.subject else ""
        listed = [f"{letter}. {text}" for letter, text in zip(LETTERS, self.choices, strict=False)]
        lines = [
            f"The following is a multiple choice question{about}. Answer with the letter of the right choice only.",
            "",
            self.question,
            *listed,
        ]
        return Prompt.of("\n".join(lines), harmful=False, source="capability")


@dataclass(frozen=True, slots=True)
class Fact:
    """A question with a short answer, and the answers that are accepted."""

    question: str
    answers: tuple[str, ...]
    kind: str

    @property
    def prompt(self) -> Prompt:
        """The chat: the question, and that a short answer will do."""
        return Prompt.of(f"{self.question} Answer in a few words.", harmful=False, source="facts", category=self.kind)

    def right(self, text: str) -> bool:
        """Whether an accepted answer stands in `text` as a word (or as words), whatever the case."""
        folded = _folded(text)
        return any(re.search(rf"(?<!\w){re.escape(_folded(one))}(?!\w)", folded) for one in self.answers)


_Item = TypeVar("_Item", Choices, Fact)


def load_choices(
    name: str, *, data_dir: str | Path | None = None, limit: int | None = None, seed: int = 0
) -> list[Choices]:
    """The test questions of the benchmark `name` (see BENCHMARKS), at most `limit`, drawn by `seed`, each once.

    data_dir: the data folder, by default the variable ELSTEER_DATA. Raises PromptError: no such benchmark, a row that is not
    in the format (it says which), or a hub that does not answer.
    """
    if name not in BENCHMARKS:
        raise PromptError(f"There is no benchmark '{name}' of capability: choose among {', '.join(BENCHMARKS)}.")
    benchmark = BENCHMARKS[name]
    folder = data_folder(data_dir)
    path = folder / "capability" / benchmark.file if folder is not None else None
    if path is not None and path.is_file():
        place, rows = str(path), _file_rows(path)
    else:
        place = benchmark.hub_id
        try:
            placed = hub_rows(
                benchmark.hub_id, config=benchmark.config, split=benchmark.split, revision=benchmark.revision
            )
        except HubError as error:
            raise PromptError(
                f"{benchmark.title} could not be read: {error.reason}; {error.remedy}, or give a folder that holds it as "
                f"capability/{benchmark.file} with --data-dir."
            ) from error
        rows = [row for _, row in placed]
    read = {"mmlu": _mmlu, "arc": _arc, "truthfulqa": _truthfulqa}[name]
    found = []
    for number, row in enumerate(rows, start=1):
        try:
            one = read(row)
            if one is not None and not (0 <= one.answer < len(one.choices) <= (len(LETTERS) if one.letters else 99)):
                raise ValueError(f"its answer is none of its {len(one.choices)} choices")
        except (LookupError, ValueError, OverflowError, TypeError, AttributeError) as error:
            raise PromptError(
                f"{place}, row {number} is no question of {benchmark.title} ({error}): get the file again."
            ) from error
        if one is not None:
            found.append(one)
    if not found:
        raise PromptError(f"{place} holds no test question of {benchmark.title}: get the file again.")
    return _drawn(found, limit, seed)


def load_facts(*, limit: int | None = None, seed: int = 0) -> list[Fact]:
    """The shipped questions with short answers, at most `limit`, drawn by `seed`."""
    text = resources.files("elsteer.evaluation").joinpath("facts.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return _drawn([Fact(row["question"], tuple(row["answers"]), row["kind"]) for row in rows], limit, seed)


def _drawn(items: Sequence[_Item], limit: int | None, seed: int) -> list[_Item]:
    """Each prompt once, in order; `limit` of them by a draw that depends on the seed and the prompts alone."""
    if limit is not None and limit < 1:
        raise PromptError(f"The limit of questions must be at least 1, not {limit}.")
    by_id = {one.prompt.id: one for one in items}
    kept = sorted(by_id, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).hexdigest())[:limit]
    wanted = set(kept)
    return [one for key, one in by_id.items() if key in wanted]


def _file_rows(path: Path) -> list[Mapping[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        lines = text.split("\n")  # not splitlines: U+2028 may stand in a text
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise PromptError(f"{path} cannot be read ({error}): get the file again.") from error
    if not isinstance(rows, list):
        raise PromptError(f"{path} holds no list of questions: get the file again.")
    return rows


def _mmlu(row: Mapping[str, Any]) -> Choices | None:
    if row.get("split", "test") != "test":
        return None
    subject = str(row["subject"]).replace("_", " ")
    return Choices(str(row["question"]).strip(), _texts(row["choices"]), int(row["answer"]), subject)


def _arc(row: Mapping[str, Any]) -> Choices:
    """Of the file, {"A": text, ..., "label": ["A", ...]}; of the hub, {"choices": {"text": [...], "label": [...]}}."""
    if "choices" in row:
        labels, texts = list(row["choices"]["label"]), _texts(row["choices"]["text"])
    else:
        labels = list(row["label"])
        texts = _texts(row[label] for label in labels)
    return Choices(str(row["question"]).strip(), texts, labels.index(row.get("answerKey", row.get("answer"))))


def _truthfulqa(row: Mapping[str, Any]) -> Choices:
    """Of the file, {"mc1_targets": {text: 0 or 1}}; of the hub, {"mc1_targets": {"choices": [...], "labels": [...]}}."""
    targets = row["mc1_targets"]
    if set(targets) == {"choices", "labels"}:
        texts, labels = _texts(targets["choices"]), list(targets["labels"])
    else:
        texts, labels = _texts(targets), list(targets.values())
    if sum(labels) != 1:
        raise ValueError("it has not one right choice")
    return Choices(str(row["question"]).strip(), texts, labels.index(1), letters=False)


def _texts(values: Iterable[Any]) -> tuple[str, ...]:
    if isinstance(values, str):
        raise ValueError("its choices are a text and no list")
    return tuple(str(value).strip() for value in values)


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()
