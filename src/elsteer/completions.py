"""Completions: what a model answers, in batches, stopped once the verdict is sure, with the states captured on the way.

Each finished batch is on disk (states first, then the rows of completions.jsonl, which are the mark that it is done), so a
killed run goes on where it was.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elsteer.decoding import (
    TOKENS_ON_A_GPU,
    TOKENS_PER_BATCH,
    Attached,
    PromptBatch,
    SharedPrefix,
    batches,
    decode,
    mapped,
    prefill,
    share_prefix,
)
from elsteer.energy.context import values_of
from elsteer.errors import PromptError, RunError
from elsteer.files import append_jsonl, read_rows
from elsteer.judges import Judge, Verdict, judge_all
from elsteer.models import context_length, decoder_blocks, encode_chat
from elsteer.prompts import Prompt
from elsteer.states import StateStore, watch_states

__all__ = [
    "Batches",
    "Completion",
    "PromptCaches",
    "bytes_per_token",
    "complete",
    "encode",
    "end_ids",
    "read_completions",
]

Progress = Callable[[int, int], None]
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Completion:
    """What the model answered to one prompt, and the judge's word on it.

    finished: the model came to its own end; otherwise it was stopped by the verdict or by the token limit.
    """

    prompt_id: str
    text: str
    tokens: int
    finished: bool
    label: str
    score: float
    reason: str

    @property
    def verdict(self) -> Verdict:
        """Label, score and reason."""
        return Verdict(self.label, self.score, self.reason)  # type: ignore[arg-type]


def encode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    system: str | None = None,
    thinking: bool | None = None,
    room: int = 0,
) -> list[list[int]]:
    """Token ids of each prompt's chat. Raises PromptError for one that leaves no `room` for new tokens in the context."""
    limit = context_length(model)
    rows = []
    for prompt in prompts:
        ids = encode_chat(tokenizer, list(prompt.messages), system=system, thinking=thinking)
        if len(ids) + room > limit:
            raise PromptError(
                f"The prompt {prompt.text[:60]!r}... ({prompt.source or 'no source'}) is {len(ids)} tokens long and the "
                f"model's context is {limit} with {room} kept for the answer: shorten it or leave it out."
            )
        rows.append(ids)
    return rows


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Token ids that end an answer: those of the generation config and the tokenizer's own."""
    config = getattr(model.generation_config, "eos_token_id", None)
    found = set(config if isinstance(config, list) else [config]) | {tokenizer.eos_token_id}
    return {one for one in found if one is not None}


class PromptCaches:
    """The prefill of many prompts, done once, used by every later run over them (plain, steered, each trial).

    Kept up to `keep_bytes`, on a GPU up to a quarter of what the weights leave of it; what does not fit is computed again each
    time. folder: where files are made that the caches of a
    model on the CPU are mapped from, without a name and gone with the caches; None, or no room there: memory holds them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        *,
        batch_size: int = 64,
        system: str | None = None,
        thinking: bool | None = None,
        room: int = 64,
        keep_bytes: int = 4 << 30,
        folder: Path | None = None,
    ) -> None:
        self.folder = folder
        self.model, self.tokenizer, self.prompts = model, tokenizer, list(prompts)
        self.ids = encode(model, tokenizer, self.prompts, system=system, thinking=thinking, room=room)
        self.batch_size, self.keep_bytes = batch_size, kept_at_most(model, keep_bytes)
        self._shared: SharedPrefix | None = None
        self._kept: dict[tuple[int, ...], PromptBatch] = {}
        self._used = 0

    def batches(self, places: Iterable[int] | None = None) -> Iterable[PromptBatch]:
        """Prefilled batches of the prompts at `places` (all by default), longest prompts first."""
        chosen = list(range(len(self.prompts))) if places is None else list(places)
        for key in self._keys(chosen):
            yield self.batch(key)

    def batch(self, key: tuple[int, ...]) -> PromptBatch:
        """The batch of these places, kept or prefilled."""
        if (kept := self._kept.get(key)) is not None:
            return kept
        if self._shared is None:
            self._shared = share_prefix(self.model, self.ids)
        batch = prefill(self.model, self.ids, list(key), self._shared)
        if self._used + batch.nbytes <= self.keep_bytes:
            batch = self._stored(batch)
            self._kept[key], self._used = batch, self._used + batch.nbytes
        return batch

    def _stored(self, batch: PromptBatch) -> PromptBatch:
        if self.folder is not None:
            with suppress(RunError):  # the disk is full
                return mapped(batch, self.folder / "caches")
        return batch

    def forget(self) -> None:
        """Give the memory back."""
        self._kept, self._used = {}, 0

    def in_memory(
        self, groups: Sequence[Sequence[int]], seed: int = 0, progress: Progress | None = None
    ) -> Sequence[PromptBatch]:
        """Batches of the places of each group, as `batches` makes them, all held at once; those that are kept are taken.

        Where `keep_bytes` is too small for all of them, a GPU prefills those without room whenever they are asked for. A CPU
        takes those of the first groups and, of the group that has no room as a whole, a sample by `seed`; a warning says how
        many. progress(done, total): prompts, where some are not kept.
        """
        places = sorted(place for group in groups for place in group)
        keys = {key for group in groups for key in self._keys(group)}
        for key in set(self._kept) - keys:
            self._used -= self._kept.pop(key).nbytes
        if self.model.device.type != "cpu":
            return Batches(self, [key for group in groups for key in self._keys(group)])
        if not self._kept:
            next(iter(self.batches(groups[0])))
        # Bytes go by rows and columns, whichever batches are there: what fits must not depend on what ran before.
        each = self._used / max(1, sum(map(self._size, self._kept)))
        fit = int(self.keep_bytes / each / sum(map(self._size, keys)) * len(places)) if each else 0
        fit = max(self.batch_size, fit)
        if fit < len(places):
            self.forget()
            groups = _first_of(groups, fit, seed)
            logger.warning(
                "Training through the model sees %d of %d prompts, as the key-value caches of more take more than %.1f GiB: "
                "raise refine_memory (--training-refine-memory) where there is room.",
                fit,
                len(places),
                self.keep_bytes / 2**30,
            )
        total = sum(map(len, groups))
        told = progress if sum(map(len, self._kept)) < total else None
        held: list[PromptBatch] = []
        done = 0
        for batch in (batch for group in groups for batch in self.batches(group)):
            held.append(batch)
            done += len(batch.rows)
            if told is not None:
                told(done, total)
        return held

    @cached_property
    def _most(self) -> int:
        """Tokens of a batch, pads included."""
        if self.model.device.type == "cpu":
            return TOKENS_PER_BATCH
        return max(
            TOKENS_PER_BATCH, min(TOKENS_ON_A_GPU, int(room_on_a_gpu(self.model) / 8 / bytes_per_token(self.model)))
        )

    def _size(self, key: tuple[int, ...]) -> int:
        """Rows times columns of a batch."""
        return len(key) * max(len(self.ids[place]) for place in key)

    def _keys(self, places: Sequence[int]) -> list[tuple[int, ...]]:
        groups = batches([self.ids[place] for place in places], self.batch_size, tokens=self._most)
        return [tuple(places[at] for at in group) for group in groups]


class Batches(Sequence[PromptBatch]):
    """Batches of `caches` by key, the places of their prompts; made when they are asked for, and kept where there is room."""

    def __init__(self, caches: PromptCaches, keys: list[tuple[int, ...]]) -> None:
        self.caches, self.keys = caches, keys

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, at: int) -> PromptBatch: ...
    @overload
    def __getitem__(self, at: slice) -> Batches: ...
    def __getitem__(self, at: int | slice) -> PromptBatch | Batches:
        return Batches(self.caches, self.keys[at]) if isinstance(at, slice) else self.caches.batch(self.keys[at])


def complete(
    caches: PromptCaches,
    judge: Judge,
    *,
    max_new_tokens: int = 48,
    early_stop: bool = True,
    steering: Attached | None = None,
    places: Iterable[int] | None = None,
    path: Path | None = None,
    extra: dict[str, Any] | None = None,
    describe: Callable[[Prompt], dict[str, Any]] | None = None,
    states: StateStore | None = None,
    state_tokens: int = 1,
    values: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> list[Completion]:
    """Answer the prompts of `caches` greedily, judge the answers, and return them in the prompts' order.

    early_stop: stop a row as soon as the judge's verdict is decided. path: append each batch to this JSONL and skip
    prompts that it already holds; `extra` fields mark the rows and are what resuming looks for, `describe` adds fields for
    people. states: capture every block's input at the prompt's last token and the first state_tokens - 1 generated ones, and
    the cached values of these blocks, from and up to (`elsteer.energy.context`).
    progress(done, total) after each batch.
    """
    chosen = list(range(len(caches.prompts))) if places is None else list(places)
    done = read_completions(path, extra) if path is not None else {}
    if states is not None and done:
        captured = states.ids()
        done = {key: one for key, one in done.items() if key in captured}
    todo = [place for place in chosen if caches.prompts[place].id not in done]
    if progress is not None:
        progress(len(chosen) - len(todo), len(chosen))
    ends = end_ids(caches.model, caches.tokenizer)
    finished = len(chosen) - len(todo)
    for batch in caches.batches(todo):
        fresh = _answer(caches, batch, judge, max_new_tokens, early_stop, ends, steering, states, state_tokens, values)
        if path is not None:
            append_jsonl(
                path,
                [
                    {**(extra or {}), **(describe(prompt) if describe else {}), **asdict(one)}
                    for prompt, one in zip((caches.prompts[place] for place in batch.rows), fresh, strict=True)
                ],
            )
        done.update((one.prompt_id, one) for one in fresh)
        finished += len(fresh)
        if progress is not None:
            progress(finished, len(chosen))
    return [done[caches.prompts[place].id] for place in chosen]


def read_completions(path: Path, extra: dict[str, Any] | None = None) -> dict[str, Completion]:
    """What `complete` wrote to `path`, by prompt id; only rows with these `extra` fields. No file gives none."""

    def of(row: dict[str, Any]) -> Completion | None:
        if any(row.get(key) != value for key, value in (extra or {}).items()):
            return None
        return Completion(**{name: row[name] for name in Completion.__dataclass_fields__})

    return {one.prompt_id: one for one in read_rows(path, of) if one is not None}


def _answer(
    caches: PromptCaches,
    batch: PromptBatch,
    judge: Judge,
    max_new_tokens: int,
    early_stop: bool,
    ends: set[int],
    steering: Attached | None,
    states: StateStore | None,
    state_tokens: int,
    values: tuple[int, int] | None,
) -> list[Completion]:
    tokenizer = caches.tokenizer
    prompts = [caches.prompts[place] for place in batch.rows]

    def text_of(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def decided(i: int, tokens: list[int]) -> bool:
        if len(tokens) < state_tokens or len(tokens) < 3:
            return False
        return judge.decided(prompts[i].text, text_of(tokens)) is not None

    stop = decided if early_stop else None
    if states is None:
        out = decode(caches.model, batch, max_new_tokens=max_new_tokens, end_ids=ends, decided=stop, steering=steering)
    else:
        blocks = decoder_blocks(caches.model)
        seen = None if values is None else values_of(batch, values)
        kept: list[tuple[list[int], Tensor]] = []
        with watch_states(blocks) as latest:

            def keep(step: int, alive: list[int]) -> None:
                if step < state_tokens:
                    kept.append((list(alive), torch.stack([one.cpu() for one in latest if one is not None], dim=1)))

            out = decode(
                caches.model,
                batch,
                max_new_tokens=max(max_new_tokens, state_tokens),
                end_ids=ends,
                decided=stop,
                steering=steering,
                on_step=keep,
            )
        block = torch.zeros(len(prompts), state_tokens, *kept[0][1].shape[1:])
        counts = torch.zeros(len(prompts), dtype=torch.int32)
        for step, (alive, found) in enumerate(kept):
            block[alive, step] = found
            counts[alive] = step + 1
        states.append([prompt.id for prompt in prompts], block, counts, seen)
    texts = [text_of(tokens) for tokens in out.tokens]
    # The early verdict and the whole text's may differ where the judge looks further: the one that stopped it counts.
    early = [
        judge.decided(prompt.text, text) if early_stop and not ended else None
        for prompt, text, ended in zip(prompts, texts, out.ended, strict=True)
    ]
    rest = [i for i, verdict in enumerate(early) if verdict is None]
    whole = judge_all(judge, [prompts[i].text for i in rest], [texts[i] for i in rest])
    verdicts = {i: one for i, one in enumerate(early) if one is not None} | dict(zip(rest, whole, strict=True))
    return [
        Completion(
            prompt.id,
            texts[i],
            len(out.tokens[i]),
            out.ended[i],
            verdicts[i].label,
            verdicts[i].score,
            verdicts[i].reason,
        )
        for i, prompt in enumerate(prompts)
    ]


def _first_of(groups: Sequence[Sequence[int]], count: int, seed: int) -> list[list[int]]:
    """`count` of the places: the first groups whole, and a sample of the one that is cut."""
    found: list[list[int]] = []
    for group in groups:
        left = count - sum(map(len, found))
        if left > 0:
            found.append(list(group) if len(group) <= left else sorted(random.Random(seed).sample(list(group), left)))
    return found


def bytes_per_token(model: PreTrainedModel) -> int:
    """Of the key-value cache, by the configuration: an upper bound where blocks differ."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    pairs = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * config.num_hidden_layers * pairs * width * model.dtype.itemsize)


def room_on_a_gpu(model: PreTrainedModel) -> int:
    """Bytes of the model's accelerator that its weights leave; the same whatever else is there for now."""
    device = model.device
    if device.type != "cuda":
        return sys.maxsize
    weights = sum(one.nbytes for one in model.parameters() if one.device == device)
    return max(0, torch.cuda.get_device_properties(device).total_memory - weights)


def kept_at_most(model: PreTrainedModel, wanted: int) -> int:
    """`wanted` bytes of caches, on a GPU no more than a quarter of its room."""
    return wanted if model.device.type == "cpu" else min(wanted, room_on_a_gpu(model) // 4)
