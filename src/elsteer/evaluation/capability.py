"""`capability`: whether steering makes the model worse at what has nothing to do with refusing.

    found = capability(model, tokenizer, landscape, ["mmlu", "facts", "kl"], out="runs/mine", limit=500)
    found.choices["mmlu"].difference   # share right, steered minus plain, with its interval
    found.figures(command="...")       # in the format of results/main.json

Tasks. mmlu, arc: zero-shot under the chat template, the most likely letter is the answer; a letter counts with both of its
spellings, "A" and " A", where they are one token. truthfulqa (MC1): the choice with the highest log-likelihood, summed over
its tokens, as the assistant's answer. facts: short greedy answers; kept is the share of those that the plain model gets
right and that stay right. kl: on neutral prompts, mean KL(plain || steered) per token in nats along the plain model's
answers, the length of the answers, and how many are degenerate.

Plain and steered start from one prefill of each prompt, since steering first moves a prompt's last token. Every row is in
OUT/capability/TASK.jsonl at once, and a run that was killed goes on there; the figures are in OUT/capability.json.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elsteer.completions import PromptCaches, end_ids
from elsteer.decoding import PromptBatch, decode, rows_of, score
from elsteer.errors import ModelError, PromptError, SteeringError
from elsteer.evaluation.capability_data import BENCHMARKS, LETTERS, Choices, Fact, load_choices, load_facts
from elsteer.evaluation.figures import Figure, machine, write_figures
from elsteer.evaluation.quality import Answer, kl_to_plain
from elsteer.evaluation.statistics import (
    Interval,
    mcnemar_exact,
    mean_bootstrap,
    paired_difference,
    ratio_bootstrap,
    wilson,
)
from elsteer.files import append_jsonl, read_rows
from elsteer.judges.degenerate import degeneration
from elsteer.landscape import Landscape
from elsteer.models import fingerprint
from elsteer.prompts import Prompt, load_starter
from elsteer.run import RunFolder, key_of, told_apart, without_nan
from elsteer.steering import Steering

__all__ = ["TASKS", "Attachable", "Capability", "Lengths", "Paired", "capability"]

TASKS = (*BENCHMARKS, "facts", "kl")
FACT_TOKENS = 24
_TOO_FAR = "its strength is far too high, or the model's dtype too small."
_VERSION = 1  # of the prompts and the scoring: rows of another one are made anew

Progress = Callable[[str, int, int], None]
Row = dict[str, Any]


class Attachable(Protocol):
    """Anything that steers: a landscape, a candidate of a baseline."""

    def attach(self, model: PreTrainedModel) -> AbstractContextManager[Steering | None]: ...


@dataclass(frozen=True, slots=True)
class Paired:
    """Shares of right answers to the same n questions. difference: steered minus plain. p: McNemar's, exact, two-sided."""

    plain: Interval
    steered: Interval
    difference: Interval
    p: float

    @property
    def n(self) -> int:
        """Questions."""
        return self.plain.n

    @classmethod
    def of(cls, plain: Sequence[bool], steered: Sequence[bool]) -> Paired:
        """From whether each answer is right, paired by position."""
        pairs = list(zip(plain, steered, strict=True))
        only_plain, only_steered = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
        return cls(
            wilson(sum(plain), len(pairs)),
            wilson(sum(steered), len(pairs)),
            paired_difference(plain, steered),
            mcnemar_exact(only_plain, only_steered),
        )


@dataclass(frozen=True, slots=True)
class Lengths:
    """Mean tokens of the answers to n neutral prompts and their ratio, steered to plain.

    cut: the shares of answers, plain and steered, that the limit of `limit` tokens cut off.
    """

    plain: float
    steered: float
    ratio: Interval
    cut: tuple[float, float]
    limit: int


@dataclass
class Capability:
    """What was found; None or no entry for a task that was not asked for.

    choices: by benchmark. facts: shares right; facts_kept: of those that the plain model gets right, the share that stays
    right. kl: nats per token. degenerate: shares of degenerate answers to neutral prompts.
    """

    model: str
    seed: int
    choices: dict[str, Paired] = field(default_factory=dict)
    facts: Paired | None = None
    facts_kept: Interval | None = None
    kl: Interval | None = None
    lengths: Lengths | None = None
    degenerate: Paired | None = None

    def figures(self, command: str = "") -> list[Figure]:
        """The figures, in the format of the files under results/; what could not be measured is left out."""
        found: list[Figure] = []

        def add(name: str, value: Interval | None, note: str) -> None:
            if value is not None and value.defined:
                found.append(
                    Figure.of(f"capability.{name}", value, command, self.seed, self.model, machine(), note or None)
                )

        for name, pair in self.choices.items():
            how = "by letter" if BENCHMARKS[name].letters else "by likelihood of the answer"
            note = f"{BENCHMARKS[name].title}, zero-shot, {how}; McNemar p {pair.p:.3g}"
            add(f"{name}_plain", pair.plain, note)
            add(f"{name}_steered", pair.steered, note)
            add(f"{name}_difference", pair.difference, note)
        if self.facts is not None:
            add("facts_plain", self.facts.plain, "short answers, shipped questions")
            add("facts_steered", self.facts.steered, "short answers, shipped questions")
            add("facts_kept", self.facts_kept, "of the facts that the plain model gets right")
        add("kl_neutral", self.kl, "nats per token along the plain answers")
        if self.lengths is not None:
            cut = f"{self.lengths.cut[0]:.0%} and {self.lengths.cut[1]:.0%} cut off at {self.lengths.limit} tokens"
            add(
                "length_ratio",
                self.lengths.ratio,
                f"mean tokens {self.lengths.plain:.1f} plain, {self.lengths.steered:.1f} steered; {cut}",
            )
        if self.degenerate is not None:
            add("degenerate_difference", self.degenerate.difference, "answers to neutral prompts")
        return found


def capability(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    landscape: Landscape | Attachable,
    tasks: Sequence[str] = TASKS,
    *,
    out: str | Path,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    strength: float | None = None,
    neutral: Sequence[Prompt] | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 128,
    progress: Progress | None = None,
    command: str = "",
) -> Capability:
    """Measure plain against steered on `tasks` and write OUT/capability.json.

    landscape: or anything with `attach(model)`. strength: of a landscape, default its own. limit: questions (or prompts) of a
    task at most, drawn by seed. neutral: prompts of the task kl, by default the plain starter prompts of the test split.
    max_new_tokens: of the answers to neutral prompts. Raises PromptError for an unknown task, LandscapeError where the
    landscape does not fit, SteeringError for a method that changes the prompt (a system prompt).
    """
    if unknown := [one for one in tasks if one not in TASKS]:
        raise PromptError(f"There is no task '{unknown[0]}' of capability: choose among {', '.join(TASKS)}.")
    if not tasks:
        raise PromptError(f"Give at least one task of capability: {', '.join(TASKS)}.")
    if getattr(landscape, "system", None):
        raise SteeringError(
            "This method puts a system prompt before each chat, so that plain and steered share no prompt: measure it "
            "as a model of its own."
        )
    wanted = list(dict.fromkeys(tasks))
    data = _data(wanted, data_dir, limit, seed, neutral)  # bad files are told of before the model runs
    run = RunFolder(out)
    run.refuse_others(("capability.json", "capability"), ("stages.json",))
    known = landscape.asked_with if isinstance(landscape, Landscape) else {}
    with run.owned(), _attached(model, tokenizer, landscape, strength) as steering:
        now = fingerprint(model, tokenizer, known.get("thinking"))
        shown = (now.named_as(landscape.fingerprint.name) if isinstance(landscape, Landscape) else now).to_dict()
        key = key_of(_VERSION, shown, _identity(steering), known.get("system"), str(model.dtype))
        run.stage("capability", key, ["capability.json"])  # of another landscape, strength or dtype no figure stays
        work = _Work(
            model, tokenizer, steering, run, batch_size, key, known.get("system"), known.get("thinking"), progress
        )
        found = Capability(str(shown["name"] or type(model).__name__), seed)
        for task in wanted:
            if task == "facts":
                _summarise_facts(found, work.facts(data[task]))
            elif task == "kl":
                _summarise_kl(found, work.neutral(data[task], max_new_tokens), seed, max_new_tokens)
            else:
                rows = work.choices(task, data[task])
                found.choices[task] = Paired.of(
                    [row["plain"] == row["answer"] for row in rows], [row["steered"] == row["answer"] for row in rows]
                )
        write_figures(run / "capability.json", found.figures(command))
    return found


def _data(
    tasks: Sequence[str], data_dir: str | Path | None, limit: int | None, seed: int, neutral: Sequence[Prompt] | None
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for task in tasks:
        if task == "facts":
            found[task] = load_facts(limit=limit, seed=seed)
        elif task == "kl":
            prompts = neutral if neutral is not None else [p for p in load_starter("test") if p.category == "plain"]
            unique = {prompt.id: prompt for prompt in told_apart(prompts)}
            if not unique:
                raise PromptError("There is no neutral prompt: give a file with at least one.")
            if limit is not None and limit < 1:
                raise PromptError(f"The limit of prompts must be at least 1, not {limit}.")
            order = sorted(unique, key=lambda one: hashlib.sha256(f"{seed}:{one}".encode()).hexdigest())[:limit]
            found[task] = [unique[one] for one in order]
        else:
            found[task] = load_choices(task, data_dir=data_dir, limit=limit, seed=seed)
    return found


def _attached(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    landscape: Landscape | Attachable,
    strength: float | None,
) -> AbstractContextManager[Steering | None]:
    if isinstance(landscape, Landscape):
        return landscape.attach(model, strength, tokenizer=tokenizer)
    if strength is not None:
        raise SteeringError("Only a landscape takes a strength here: set the strength of the method itself.")
    return landscape.attach(model)


def _identity(steering: Steering | None) -> Any:
    """What the rows of a method rest on: what moves, by how much, for how long. Equal for equal methods."""
    if steering is None:
        return None
    strength = torch.as_tensor(steering.strength).tolist()
    moves = {str(at): _move_identity(move) for at, move in steering._moves.items()}
    return [steering.window, strength, moves]


def _move_identity(move: Any) -> Any:
    plain = (bool, int, float, str, type(None))
    parts = dict(move.named_modules()) if isinstance(move, nn.Module) else {"": move}
    own = {
        f"{part}.{name}" if part else name: value
        for part, module in parts.items()
        for name, value in vars(module).items()
        if isinstance(value, plain) and name != "training"
    }
    tensors = {name: value for name, value in vars(move).items() if isinstance(value, Tensor)}
    if isinstance(move, nn.Module):
        tensors |= dict(move.named_buffers()) | dict(move.named_parameters())
    digests = {}
    for name, tensor in sorted(tensors.items()):
        bits = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor
        digests[name] = hashlib.sha256(bits.cpu().numpy().tobytes()).hexdigest()[:16]
    return [type(move).__qualname__, own, digests]


@dataclass
class _Work:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    steering: Steering | None
    run: RunFolder
    batch_size: int
    key: str
    system: str | None
    thinking: bool | None
    progress: Progress | None

    def choices(self, task: str, items: Sequence[Choices]) -> list[Row]:
        """Rows {"id", "answer", "plain", "steered"}: places of the right choice and of those that were taken."""
        answers = {one.prompt.id: one for one in items}
        letters = self._letters() if BENCHMARKS[task].letters else []

        def about(one: Choices) -> Row:
            """What a row holds of the question besides its id, which does not tell choices that are not in the prompt."""
            more = {} if BENCHMARKS[task].letters else {"choices": key_of(one.choices)}
            return {"answer": one.answer, "subject": one.subject, **more}

        def measure(caches: PromptCaches, batch: PromptBatch) -> list[Row]:
            given = [answers[caches.prompts[place].id] for place in batch.rows]
            sides = {}
            for name, steering in (("plain", None), ("steered", self.steering)):
                if BENCHMARKS[task].letters:
                    sides[name] = _by_letter(self.model, batch, given, letters, steering)
                else:
                    sides[name] = _by_likelihood(self.model, batch, self._encoded(given), steering)
            return [
                {**about(one), "plain": plain, "steered": steered}
                for one, plain, steered in zip(given, sides["plain"], sides["steered"], strict=True)
            ]

        room = 1
        if not BENCHMARKS[task].letters:
            room = max(len(ids) for row in self._encoded(items) for ids in row)

        def known(row: Row) -> bool:
            """Whether choices and right answer are still those that the row was measured with: a file may have been mended.

            Rows of earlier versions do not tell their choices.
            """
            same = about(answers[row["id"]]) if row["id"] in answers else {}
            return all(row.get(name, same[name]) == same[name] for name in same.keys() & {"answer", "choices"})

        return self._rows(task, BENCHMARKS[task].title, [one.prompt for one in items], room, measure, known=known)

    def facts(self, items: Sequence[Fact]) -> list[Row]:
        """Rows {"id", "question", "plain", "steered", "plain_right", "steered_right"} of greedy answers."""
        facts = {one.prompt.id: one for one in items}

        def measure(caches: PromptCaches, batch: PromptBatch) -> list[Row]:
            given = [facts[caches.prompts[place].id] for place in batch.rows]
            plain, steered = (self._texts(batch, FACT_TOKENS, steering)[0] for steering in (None, self.steering))
            return [
                {
                    "question": one.question,
                    "plain": before,
                    "steered": after,
                    "plain_right": one.right(before),
                    "steered_right": one.right(after),
                }
                for one, before, after in zip(given, plain, steered, strict=True)
            ]

        # The questions are part of the key: an accepted answer that was added must not leave old verdicts.
        extra = sorted([one.question, list(one.answers)] for one in load_facts())
        return self._rows("facts", "facts", [one.prompt for one in items], FACT_TOKENS, measure, extra)

    def neutral(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Row]:
        """Rows {"id", "kl", "plain", "steered", "plain_tokens", "steered_tokens", ...} of answers to neutral prompts."""

        def measure(caches: PromptCaches, batch: PromptBatch) -> list[Row]:
            ids = [caches.prompts[place].id for place in batch.rows]
            (plain, plain_ids), (steered, steered_ids) = (
                self._texts(batch, max_new_tokens, steering) for steering in (None, self.steering)
            )
            kls = dict.fromkeys(ids, 0.0)
            if self.steering is not None:
                along = {
                    one: Answer(one, "none", text, tokens, math.nan, "")
                    for one, text, tokens in zip(ids, plain, plain_ids, strict=True)
                }
                kls = kl_to_plain(_One(caches, batch), along, steering=self.steering, tokens=max_new_tokens)
            return [
                {
                    "kl": kls[one],
                    "plain": before,
                    "steered": after,
                    "plain_tokens": len(plain_ids[i]),
                    "steered_tokens": len(steered_ids[i]),
                    "plain_degenerate": degeneration(before) or "",
                    "steered_degenerate": degeneration(after) or "",
                }
                for i, (one, before, after) in enumerate(zip(ids, plain, steered, strict=True))
            ]

        return self._rows("kl", "neutral prompts", prompts, max_new_tokens, measure, max_new_tokens)

    def _rows(
        self,
        task: str,
        title: str,
        prompts: Sequence[Prompt],
        room: int,
        measure: Callable[[PromptCaches, PromptBatch], list[Row]],
        extra: Any = None,
        known: Callable[[Row], bool] = bool,
    ) -> list[Row]:
        """The rows of `prompts`, those on disk taken as they are where `known`; `measure` makes those of a batch, without
        their ids."""
        name = f"capability/{task}.jsonl"
        self.run.stage(f"capability {task}", key_of(self.key, extra), [name])
        path = self.run / name
        told = read_rows(path, lambda row: (row["id"], row, known(row)))
        rows = {one: row for one, row, same in told if same}
        todo = [prompt for prompt in prompts if prompt.id not in rows]
        done = len(prompts) - len(todo)
        self._tell(title, done, len(prompts))
        if todo:
            caches = PromptCaches(
                self.model,
                self.tokenizer,
                todo,
                batch_size=self.batch_size,
                system=self.system,
                thinking=self.thinking,
                room=room,
                keep_bytes=0,
            )
            for batch in caches.batches():
                ids = [caches.prompts[place].id for place in batch.rows]
                fresh = [without_nan({"id": one, **row}) for one, row in zip(ids, measure(caches, batch), strict=True)]
                append_jsonl(path, fresh)
                rows.update((row["id"], row) for row in fresh)
                done += len(fresh)
                self._tell(title, done, len(prompts))
        return [rows[prompt.id] for prompt in prompts]

    def _tell(self, title: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(title, done, total)

    def _texts(self, batch: PromptBatch, limit: int, steering: Steering | None) -> tuple[list[str], list[list[int]]]:
        ends = end_ids(self.model, self.tokenizer)
        tokens = decode(self.model, batch, max_new_tokens=limit, end_ids=ends, steering=steering).tokens
        return [str(self.tokenizer.decode(row, skip_special_tokens=True)).strip() for row in tokens], tokens

    def _letters(self) -> list[list[int]]:
        """Token ids of each letter: of "A" and of " A", where that is one token."""
        found = []
        for letter in LETTERS:
            ids = {tuple(_ids(self.tokenizer, text)) for text in (letter, f" {letter}")}
            found.append(sorted({one[0] for one in ids if len(one) == 1}))
        if lacking := [letter for letter, ids in zip(LETTERS, found, strict=True) if not ids]:
            raise ModelError(
                f"The tokenizer has no single token for the letter {lacking[0]}: multiple choice by letter cannot be measured."
            )
        return found

    def _encoded(self, items: Sequence[Choices]) -> list[list[list[int]]]:
        return [[_ids(self.tokenizer, text) or [0] for text in one.choices] for one in items]


class _One(PromptCaches):
    """The caches of one batch that is there already."""

    def __init__(self, caches: PromptCaches, batch: PromptBatch) -> None:
        self.__dict__.update(caches.__dict__)
        self._batch = batch

    def batches(self, places: Any = None) -> Any:
        """That batch."""
        return [self._batch]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return [int(one) for one in tokenizer(text, add_special_tokens=False)["input_ids"]]


def _by_letter(
    model: PreTrainedModel,
    batch: PromptBatch,
    items: Sequence[Choices],
    letters: Sequence[Sequence[int]],
    steering: Steering | None,
) -> list[int]:
    """The most likely letter's place of each row, among those of its choices: one pass of the prompts' last token."""
    logits = decode(model, batch, max_new_tokens=1, end_ids=set(), steering=steering).first_logits
    assert logits is not None
    logs = torch.stack([logits[:, list(ids)].logsumexp(dim=-1) for ids in letters], dim=-1)
    _check_numbers(not bool(logs.isnan().any()), steering)
    return [int(row[: len(one.choices)].argmax()) for row, one in zip(logs, items, strict=True)]


def _by_likelihood(
    model: PreTrainedModel, batch: PromptBatch, answers: Sequence[Sequence[list[int]]], steering: Steering | None
) -> list[int]:
    """The place, among each row's answers (token ids), of the one with the highest summed log-likelihood."""
    each = [i for i, row in enumerate(answers) for _ in row]
    flat = [ids for row in answers for ids in row]
    values = []
    for ids, logits in zip(flat, score(model, rows_of(batch, each), flat, steering=steering), strict=True):
        chosen = torch.tensor(ids, device=logits.device)[:, None]
        values.append(float(logits.log_softmax(dim=-1).gather(1, chosen).sum()))
    _check_numbers(not any(map(math.isnan, values)), steering)
    best, at = [], 0
    for row in answers:
        part = values[at : at + len(row)]
        best.append(max(range(len(part)), key=part.__getitem__))
        at += len(row)
    return best


def _check_numbers(right: bool, steering: Steering | None) -> None:
    """Raises SteeringError where likelihoods are no numbers, of which the first would pass for the greatest."""
    if not right:
        side, why = ("plain", "its dtype is too small.") if steering is None else ("steered", _TOO_FAR)
        raise SteeringError(f"The {side} model gives likelihoods that are no numbers: {why}")


def _summarise_facts(found: Capability, rows: Sequence[Row]) -> None:
    found.facts = Paired.of([row["plain_right"] for row in rows], [row["steered_right"] for row in rows])
    kept = [row["steered_right"] for row in rows if row["plain_right"]]
    found.facts_kept = wilson(sum(kept), len(kept))


def _summarise_kl(found: Capability, rows: Sequence[Row], seed: int, limit: int) -> None:
    if broken := [row for row in rows if row["kl"] is None]:
        raise SteeringError(
            f"The steered model gives no finite distribution on {len(broken)} of {len(rows)} neutral prompts: {_TOO_FAR}"
        )
    found.kl = mean_bootstrap([row["kl"] for row in rows], seed)
    plain, steered = ([row[f"{side}_tokens"] for row in rows] for side in ("plain", "steered"))
    found.lengths = Lengths(
        sum(plain) / len(rows),
        sum(steered) / len(rows),
        ratio_bootstrap(steered, plain, seed),
        (sum(one >= limit for one in plain) / len(rows), sum(one >= limit for one in steered) / len(rows)),
        limit,
    )
    found.degenerate = Paired.of(
        [bool(row["plain_degenerate"]) for row in rows], [bool(row["steered_degenerate"]) for row in rows]
    )
