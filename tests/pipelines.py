"""A whole pipeline in a second: a random model that answers in letters, and a judge who takes some letters for refusals.

What the judge says of an answer is the model's own doing, a direction of its last hidden state, so energies can learn it
and steering can change it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elsteer.judges import Verdict
from elsteer.models import encode_chat
from elsteer.prompts import Prompt
from elsteer.settings import FitSettings
from tiny import tiny_model, tiny_tokenizer

__all__ = [
    "Killed",
    "LetterJudge",
    "Tiny",
    "dies_at",
    "forward_passes",
    "lines",
    "said",
    "some_prompts",
    "speaker",
    "tiny_settings",
]

Tiny = tuple[PreTrainedModel, PreTrainedTokenizerBase]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
THINGS = [
    "kettle",
    "bridge",
    "garden",
    "lantern",
    "window",
    "pepper",
    "violin",
    "tractor",
    "harbour",
    "pillow",
    "rocket",
]
THINGS += ["marble", "candle", "ladder", "anchor"]
VERBS = {False: ["Describe a", "Explain the", "Please draw a"], True: ["STEAL ANY", "WRECK THIS", "POISON MY"]}


class LetterJudge:
    """An answer that begins with n to z is a refusal; one that begins with no letter is unscored."""

    name = "letters"

    def judge(self, prompt: str, completion: str) -> Verdict:
        first = completion[:1].lower()
        if not first or first not in LETTERS:
            return Verdict("unscored", 0.5, "no letter")
        return Verdict("refusal", 1.0, first) if first > "m" else Verdict("compliance", 0.0, first)

    def decided(self, prompt: str, partial: str) -> Verdict | None:
        return None


def some_prompts(count: int, start: int = 0, source: str = "test") -> list[Prompt]:
    """`count` prompts, every other one harmful, none a near-duplicate of another."""
    found = []
    for number in range(start, start + count):
        harmful = number % 2 == 1
        thing, verb = THINGS[number * 7 % len(THINGS)], VERBS[harmful][number % 3]
        own = "".join(LETTERS[(number * 11 + k * (number % 5 + 3)) % 26] for k in range(4 + number % 3))
        found.append(Prompt.of(f"{verb} {thing} {own}{number}", harmful, source=source, category="test"))
    return found


def speaker(family: str = "qwen2", seed: int = 0) -> Tiny:
    """A tiny model that answers in letters, a to m or n to z about equally often, whether the prompt is harmful or not."""
    model, tokenizer = tiny_model(family, seed, **_long(family)), tiny_tokenizer("chatml")
    prompts = some_prompts(60, start=1000)
    with torch.inference_mode():
        ids = [encode_chat(tokenizer, list(one.messages)) for one in prompts]
        kept: list[torch.Tensor] = []
        head = model.get_output_embeddings()
        watching = head.register_forward_pre_hook(lambda module, args: kept.append(args[0][0, -1].clone()))
        for row in ids:
            model(input_ids=torch.tensor([row], device=model.device))
        watching.remove()
    states = torch.stack(kept).cpu()
    harmful = torch.tensor([one.harmful for one in prompts])
    means = torch.stack([states[harmful].mean(dim=0), states[~harmful].mean(dim=0)])
    varying = states - means[(~harmful).long()]
    basis = torch.linalg.qr(means.T)[0]
    varying = varying - varying @ basis @ basis.T
    way = torch.linalg.svd(varying, full_matrices=False)[2][0]
    way = way * way[way.abs().argmax()].sign()  # the sign of a singular vector differs from machine to machine
    with torch.no_grad():
        weight: torch.Tensor = head.weight
        weight.copy_(_letters(weight.cpu(), way, float(states.norm(dim=-1).mean())))
    return model, tokenizer


def _long(family: str) -> dict[str, int]:
    return {"n_positions": 512} if family == "gpt2" else {"max_position_embeddings": 512}


def _letters(weight: torch.Tensor, way: torch.Tensor, length: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    new = torch.zeros_like(weight)
    for at, letter in enumerate(LETTERS):
        side = 1.0 if at < 13 else -1.0
        noise = torch.randn(weight.shape[1], generator=generator) * 0.02
        new[_byte_ids()[letter]] = noise + side * 4.0 * way
    new[_byte_ids()[" "]] = 0.01 * new[_byte_ids()["a"]]
    return new * (8.0 / length)


def _byte_ids() -> dict[str, int]:
    tokenizer = tiny_tokenizer("chatml")
    return {letter: tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in LETTERS + " "}


def tiny_settings(**changes: Any) -> FitSettings:
    """A fit in a second; `tuning`, `training` and `collect` in changes are merged into the small ones."""
    small: dict[str, Any] = {
        "attacks": "none",
        "collect": {"judge": "letters", "batch_size": 8, "max_new_tokens": 4},
        "training": {
            "width": 8,
            "hidden": [8],
            "epochs": 6,
            "patience": 6,
            "batch_per_outcome": 8,
            "learning_rate": 0.02,
            "dropout": 0.0,
            "benign_weights": [1.0],
            "counterpart": 0.0,
            "refine_epochs": 0,
        },
        "tuning": {
            "etas": [0.3, 0.9],
            "steps": [1],
            "windows": [0],
            "gates": [None],
            "guards": [True],
            "bands": 1,
            "band_share": 0.5,
            "finalists": 2,
            "tokens": 4,
            "least_removed": -10.0,
            "safety_margin": -1.0,
            "safety_weighted": -1.0,
            "worst_source": -1.0,
            "perplexity_ratio": 1e9,
            "kl": 1e9,
            "quality_prompts": 4,
            "quality_tokens": 4,
            "neutral_prompts": 2,
        },
    }
    for name, value in changes.items():
        small[name] = {**small[name], **value} if isinstance(value, dict) else value
    return FitSettings.model_validate(small)


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def dies_at(stage: str, call: int = 2) -> Callable[[str, int, int], None]:
    """A progress callback that dies at the `call`-th word of a stage whose name holds `stage`."""
    heard = 0

    def progress(name: str, done: int, total: int) -> None:
        nonlocal heard
        if stage in name:
            heard += 1
            if heard == call:
                raise Killed(name)

    return progress


@contextmanager
def forward_passes(model: nn.Module) -> Iterator[list[int]]:
    """While open, the list holds the number of rows of each forward pass of the model."""
    rows: list[int] = []

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get("input_ids", args[0] if args else None)
        rows.append(0 if given is None else len(given))

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


def said(tiny: Tiny, prompts: Sequence[Prompt], tokens: int = 4, **asked: Any) -> list[str]:
    """What plain `generate` answers to each prompt alone. asked: the system prompt or thinking mode."""
    model, tokenizer = tiny
    found = []
    for one in prompts:
        ids = torch.tensor([encode_chat(tokenizer, list(one.messages), **asked)], device=model.device)
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        found.append(str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)).strip())
    return found


def lines(path: Path) -> list[str]:
    """Lines of a text file; none where it is not there."""
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
