"""`fit`: from prompts to a landscape, stage by stage, in a run folder that can be killed at any moment and gone on with.

prompts -> completions and states -> outcomes -> energy training -> tuning on dev under the constraints -> landscape
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import elsteer
from elsteer.completions import Completion, PromptCaches, bytes_per_token, complete
from elsteer.decoding import PromptBatch, refuse_steered
from elsteer.energy.refine import SteeredProducts, refine
from elsteer.errors import ModelError, NothingHelps, PromptError, RunError, SteeringError
from elsteer.evaluation.plots import frontier_picture
from elsteer.files import read_json, write_atomic, write_json, write_jsonl
from elsteer.glimpse import FirstTokenJudge
from elsteer.judges import DESIRABLE, judge_of_fit, outcome_of
from elsteer.landscape import Landscape
from elsteer.models import (
    Fingerprint,
    context_length,
    decoder_of,
    differences,
    effective_thinking,
    encode_chat,
    fingerprint,
    hidden_size,
    num_layers,
    render_chat,
)
from elsteer.openers import try_openers
from elsteer.prompts import (
    Prompt,
    deduplicate,
    load_starter,
    require_both_classes,
    sample,
    split_prompts,
    under_attack,
    with_attacks,
    without_near_duplicates,
)
from elsteer.run import RESULT, RunFolder, key_of, of_stage, told_apart
from elsteer.settings import FitSettings
from elsteer.states import StateStore
from elsteer.training import Energies, check_gates, check_start, context_blocks, is_refined, refine_band, train_energies
from elsteer.tuning import Trial, Tuner

__all__ = ["check_model", "collect", "fit", "neutral_prompts"]

logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
DEV_NEUTRAL_CATEGORY = "plain"
_MARKS = ("stages.json", "model.json")  # of a folder of ours
_FILES = (
    *("prompts.jsonl", "settings.yaml", "completions.jsonl", "glimpses.jsonl", "states", "dev.jsonl", "dev_states"),
    *("energy", "frontier.jsonl", *RESULT),
)
_THOUGHTS = ("<think", "<|channel", "<seed:think", "[THINK]", "analysis")  # of answers, special tokens left out or not
_NEUTRAL_AT_MOST = 100  # what the plain model says of each token is kept of all of them
_KEEP_BYTES = 4 << 30  # of the caches of dev and neutral prompts
_ON_A_GPU = 8  # times as many of these in a batch


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    run_dir: str | Path,
    dev: Sequence[Prompt] | None = None,
    neutral: Sequence[Prompt] | None = None,
    settings: FitSettings | None = None,
    start: Landscape | None = None,
    progress: Progress | None = None,
    command: str = "",
) -> Landscape:
    """Fit a landscape for `model` on `prompts` and tune it on `dev`; it is saved in run_dir/landscape and returned.

    prompts: benign ones that the model falsely refuses among them, and harmful ones. dev: prompts to tune on; without it,
    `settings.dev_share` of the prompts are set aside. Training prompts that nearly repeat a dev prompt are left out.
    neutral: everyday prompts on which the model must stay as it is, 100 at most; the plain starter prompts by default.
    start: a landscape of this model to go on from. What it says of whether refusing is due is kept, but for the threshold;
    direction, need and length of the steps are trained on with `prompts`, of which a few thousand do.
    progress(stage, done, total) is called as work goes on. Started again, `fit` goes on where it was.

    Raises PromptError, RunError (nothing to learn, folder in use, disk full, no landscape to start from), JudgeError,
    SteeringError (the model is steered), LandscapeError (`start` is of another model) and NothingHelps: no setting removed
    false refusals without harm; the landscape was saved with strength 0.
    """
    settings = settings or FitSettings()
    run = RunFolder(run_dir)
    check_gates(settings, num_layers(model))
    if start is not None:
        check_start(start, settings, num_layers(model))
        start.attach(model, 0.0, tokenizer=tokenizer).remove()
    with run.owned():
        ready = _collected(model, tokenizer, prompts, run, dev, neutral, settings, progress, fitted=True)
        judged = {one.prompt_id: one.label for one in ready.answered}
        groups = [one for one in (ready.full, ready.rest) if one]
        through = _Through(ready.train, groups, judged, settings, progress)
        train_set, depth = ready.train.prompts, num_layers(model)
        energies, train_key = train_energies(
            run, train_set, ready.completions, settings, ready.key, depth, progress, through, start
        )
        del through  # it holds the training prompts' caches, too
        ready.train.forget()
        bases = {weight: one.landscape(ready.print_of) for weight, one in energies.items()}
        trial, tuner = _tune(run, bases, ready.dev, ready.plain, ready.neutral, settings, train_key, energies, progress)
        return _finish(run, tuner, trial, energies, settings, command, start)


def collect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    landscape: Landscape,
    *,
    run_dir: str | Path,
    dev: Sequence[Prompt] | None = None,
    neutral: Sequence[Prompt] | None = None,
    settings: FitSettings | None = None,
    progress: Progress | None = None,
) -> None:
    """Answer and read `prompts` and `dev` as a fit does, and put `landscape`, fitted elsewhere, into run_dir.

    What other methods learn from and are tuned on, so that `elsteer.comparison.compare` can measure them beside it.
    neutral: the everyday prompts that they may hardly change; those of the landscape's fit, so that all are held to the same
    bound; None: those that are shipped.
    settings: by default as the landscape's prompts were asked, with its system prompt and thinking mode. Started again, it goes
    on where it was. Raises PromptError, RunError (settings that ask otherwise), and LandscapeError where it is of another model.
    """
    asked = {name: landscape.asked_with.get(name) for name in ("system", "thinking")}
    if settings is None:
        settings = FitSettings.model_validate({"collect": asked})
    if other := [name for name, value in asked.items() if getattr(settings.collect, name) != value]:
        raise RunError(
            f"The landscape's prompts were asked with {other[0]}={asked[other[0]]!r}, and these settings ask otherwise: give "
            "collect settings with the same, or none."
        )
    run = RunFolder(run_dir)
    with run.owned():
        landscape.attach(model, 0.0, tokenizer=tokenizer).remove()
        _collected(model, tokenizer, prompts, run, dev, neutral, settings, progress, fitted=False)
        landscape.save_pretrained(run / "landscape")


@dataclass
class _Collected:
    """What a fit knows once all prompts are answered and read."""

    train: PromptCaches
    dev: PromptCaches
    neutral: PromptCaches
    answered: list[Completion]  # of the training prompts `full`, in full
    completions: list[Completion]  # of all training prompts; those not answered by their first tokens
    plain: list[Completion]  # of the dev prompts
    full: list[int]
    rest: list[int]  # those trained on through the model besides `full`
    print_of: Fingerprint
    key: str


def _collected(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    run: RunFolder,
    dev: Sequence[Prompt] | None,
    neutral: Sequence[Prompt] | None,
    settings: FitSettings,
    progress: Progress | None,
    *,
    fitted: bool,
) -> _Collected:
    """fitted: whether energies are to be trained and tuned on it."""
    # What can be wrong with the prompts or the judge's name is said before anything is deleted or computed.
    run.refuse_others(_FILES, _MARKS)
    check_model(run.path, model, tokenizer, settings)
    refuse_steered(decoder_of(model))
    judge = judge_of_fit(settings.collect.judge)
    _check_template(tokenizer, prompts, settings)
    if fitted and is_refined(settings):
        _check_trainable(model)
    if settings.collect.thinking is not None and effective_thinking(tokenizer, settings.collect.thinking) is None:
        logger.warning("The chat template knows no thinking mode, so that --thinking and --no-thinking change nothing.")
    train_set, dev_set = _divide(prompts, dev, settings)
    train_set = _attacked(model, tokenizer, train_set, settings, "train")
    dev_set = _attacked(model, tokenizer, dev_set, settings, "dev")
    quiet = told_apart(deduplicate(neutral)) if neutral is not None else neutral_prompts(settings)
    quiet = sample(quiet, _NEUTRAL_AT_MOST, settings.seed)
    if not quiet:
        raise PromptError("There is no neutral prompt: give some everyday ones, or None for those that are shipped.")
    keep = settings.training.refine_memory if is_refined(settings) else 0
    train_caches = _caches(model, tokenizer, train_set, settings, run, keep_bytes=keep)
    dev_caches, neutral_caches = (_caches(model, tokenizer, some, settings, run) for some in (dev_set, quiet))
    print_of = fingerprint(model, tokenizer, thinking=settings.collect.thinking)
    looked = context_blocks(settings, num_layers(model))
    # Not by name: a folder that was moved, or a newer commit of the same weights, is the same model.
    same = {**print_of.to_dict(), "name": None, "revision": None}
    asked = {**settings.collect.model_dump(), "judge": judge.name}
    key = key_of(same, asked, str(model.dtype), looked)
    known = read_json(run / "model.json")
    named = print_of.named_as(known.get("name") if isinstance(known, dict) else None)
    run.renamed("collect", key_of(named.to_dict(), settings.collect.model_dump(), str(model.dtype), looked), key)
    _check_disk(run, model, train_caches, dev_caches, settings, looked, copies=fitted)
    _write_inputs(run, settings, {"train": train_set, "dev": dev_set, "neutral": quiet}, print_of)
    answered = _collect(run, train_caches, settings, key, looked, progress)
    _check_answers(answered)
    plain = _dev(run, dev_caches, settings, progress)
    if fitted:
        _check_dev(dev_set, plain, settings)
    full = _in_full(train_set, settings)
    rest = _refined_besides(train_set, full, settings)
    completions = _glimpse(run, train_caches, answered, plain, rest, settings, key, looked, progress)
    return _Collected(train_caches, dev_caches, neutral_caches, answered, completions, plain, full, rest, print_of, key)


@dataclass
class _Through:
    """Training through the model on the prefilled training prompts (`elsteer.training.Through`)."""

    caches: PromptCaches
    groups: list[list[int]]  # places, batched as they were answered
    judged: dict[str, str]  # by prompt id, the verdict on the whole answer
    settings: FitSettings
    progress: Progress | None

    @property
    def device(self) -> torch.device:
        return self.caches.model.device

    def train(self, products: SteeredProducts, weight: float) -> list[float]:
        return refine(
            self.caches.model,
            self._batches,
            torch.tensor([one.harmful for one in self.caches.prompts]),
            [self.judged.get(one.id) for one in self.caches.prompts],
            products,
            self.settings.training,
            benign_weight=weight,
            openers=self._openers(),
            seed=self.settings.seed,
            progress=of_stage(self.progress, "training the energies through the model"),
        )

    def _openers(self) -> dict[int, tuple[int, int]]:
        labels = {at: self.judged[one.id] for at, one in enumerate(self.caches.prompts) if one.id in self.judged}
        told = of_stage(self.progress, "trying other beginnings of answers")
        return try_openers(
            self.caches, judge_of_fit(self.settings.collect.judge), self.groups[:1], labels, progress=told
        )

    @cached_property
    def _batches(self) -> Sequence[PromptBatch]:
        """Held as long as this is: of a sample, the caches would make them anew each time."""
        told = of_stage(self.progress, "reading the training prompts again")
        return self.caches.in_memory(self.groups, self.settings.seed, told)


def _divide(
    prompts: Sequence[Prompt], dev: Sequence[Prompt] | None, settings: FitSettings
) -> tuple[list[Prompt], list[Prompt]]:
    unique = told_apart(deduplicate(prompts))
    if dev is None:
        require_both_classes(unique, "the training prompts")
        parts = split_prompts(unique, {"train": 1 - settings.dev_share, "dev": settings.dev_share}, seed=settings.seed)
        train_set, dev_set = parts["train"], parts["dev"]
    else:
        dev_set = told_apart(deduplicate(dev))
        train_set = without_near_duplicates(unique, dev_set)
        if unique and not train_set:
            raise PromptError(
                "Every training prompt nearly repeats a dev prompt: give dev prompts of their own, or none."
            )
    if settings.limit is not None:
        train_set = sample(train_set, settings.limit, settings.seed)
    if settings.dev_limit is not None:
        dev_set = sample(dev_set, settings.dev_limit, settings.seed)
    require_both_classes(train_set, "the training prompts")
    require_both_classes(dev_set, "the dev prompts")
    return train_set, dev_set


def _attacked(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    settings: FitSettings,
    split: Literal["train", "dev"],
) -> list[Prompt]:
    """The prompts, and those in templates of attacks that leave room for an answer in the model's context."""
    share = settings.attack_share if split == "train" else settings.attack_dev_share
    found = with_attacks(prompts, settings.attacks, share=share, seed=settings.seed, split=split)
    collect, most = settings.collect, context_length(model) - _room(settings)

    def fits(prompt: Prompt) -> bool:
        messages = list(prompt.messages)
        return len(encode_chat(tokenizer, messages, system=collect.system, thinking=collect.thinking)) <= most

    return [*found[: len(prompts)], *(one for one in found[len(prompts) :] if fits(one))]


def _room(settings: FitSettings) -> int:
    """Tokens that any stage may generate after a prompt."""
    collect, tuning = settings.collect, settings.tuning
    return max(collect.max_new_tokens, collect.state_tokens, tuning.tokens, tuning.quality_tokens)


def check_model(
    run_dir: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: FitSettings
) -> None:
    """Raises RunError where a fit in `run_dir` was of another model, all of whose answers would be deleted."""
    path = run_dir / "model.json"
    if not path.is_file():
        return
    now = fingerprint(model, tokenizer, thinking=settings.collect.thinking)
    try:
        known = Fingerprint.from_dict(read_json(path))
        # Another template or thinking mode of the same model is a setting that was changed.
        other = differences(replace(known, template_sha256=now.template_sha256, thinking=now.thinking), now)
    except (ModelError, TypeError) as error:
        raise RunError(f"{path} is damaged: delete it, and the fit will be checked and gone on with.") from error
    if other:
        raise RunError(
            f"{run_dir} holds a fit of another model ({known.name}): give a folder of its own with --run-dir, or delete it."
        )


def _write_inputs(
    run: RunFolder, settings: FitSettings, prompts: dict[str, list[Prompt]], print_of: Fingerprint
) -> None:
    """prompts: by split."""
    text = yaml.safe_dump(json.loads(settings.model_dump_json()), sort_keys=False)
    rows = [{**one.to_row(), "split": name} for name, part in prompts.items() for one in part]
    run.stage("inputs", key_of(text, rows), list(RESULT))  # stopped from here on, the folder has no result of others
    write_json(run / "model.json", print_of.to_dict())
    write_atomic(run / "settings.yaml", lambda to: to.write_text(text, encoding="utf-8"))
    write_jsonl(run / "prompts.jsonl", rows)


def _collect(
    run: RunFolder,
    caches: PromptCaches,
    settings: FitSettings,
    key: str,
    looked: tuple[int, int] | None,
    progress: Progress | None,
) -> list[Completion]:
    """looked: the blocks whose values are kept with the states."""
    collect = settings.collect
    if (run / "completions.jsonl").exists() and run.stages().get("collect", key) != key:
        logger.warning(
            "%s was answered with another dtype or other settings (or an earlier version), and all is made anew.",
            run.path,
        )
    answers = ["completions.jsonl", "glimpses.jsonl", "states", "dev.jsonl", "dev_states"]
    run.stage("collect", key, [*answers, "baselines", *RESULT])  # baselines: what other methods learned from the states
    try:
        return complete(
            caches,
            judge_of_fit(collect.judge),
            max_new_tokens=collect.max_new_tokens,
            places=_in_full(caches.prompts, settings),
            path=run / "completions.jsonl",
            states=StateStore(run / "states"),
            state_tokens=collect.state_tokens,
            values=looked,
            progress=of_stage(progress, "answering the training prompts"),
        )
    except SteeringError as error:
        raise RunError(
            "This model keeps no key-value cache that the context of a state could be read from: fit with "
            "--training-context-blocks 0."
        ) from error


def _check_disk(
    run: RunFolder,
    model: PreTrainedModel,
    train: PromptCaches,
    dev: PromptCaches,
    settings: FitSettings,
    looked: tuple[int, int] | None,
    *,
    copies: bool,
) -> None:
    """Raises RunError where the disk has less room than the states and, for training, copies of some of them take."""
    copies = copies and not any((run / "energy").glob("*/training.json"))
    layers = num_layers(model)
    state, band = 4 * hidden_size(model), len(refine_band(settings, layers)) if is_refined(settings) else 0
    rows = settings.collect.state_tokens * len(train.ids) + len(dev.ids)
    read = (
        0 if looked is None else sum(map(len, train.ids)) * bytes_per_token(model) * (looked[1] - looked[0]) // layers
    )
    value = read // 2 // model.dtype.itemsize * 2  # of keys and values the values, in float16
    needed = rows * layers * state + value + (len(train.ids) * band * state + value if copies else 0)
    held = sum(file.stat().st_size for name in ("states", "dev_states") for file in (run / name).glob("*.safetensors"))
    free = shutil.disk_usage(next(one for one in (run.path, *run.path.absolute().parents) if one.exists())).free
    if needed - held > free:
        raise RunError(
            f"The states of these prompts and their copies for training take {needed / 1e9:.1f} GB in {run.path}, where "
            f"{free / 1e9:.1f} GB are free: give a --run-dir on a larger disk, or fewer prompts with --limit."
        )


def _check_dev(prompts: Sequence[Prompt], plain: Sequence[Completion], settings: FitSettings) -> None:
    """Raises PromptError where no setting could be chosen by these dev prompts, whatever is trained."""
    labels = {
        kind: [one.label for one, prompt in zip(plain, prompts, strict=True) if prompt.harmful == kind]
        for kind in (False, True)
    }
    if set(labels[False]) <= {"unscored"}:
        raise PromptError(
            "Every answer to a benign dev prompt was empty, repetitive or garbled: check the model and its chat template."
        )
    if "refusal" not in labels[False]:
        raise PromptError(
            "The model refuses no benign dev prompt: there is nothing to tune. Give dev prompts that it refuses, or leave the "
            "model as it is."
        )
    if "compliance" not in labels[False]:
        raise PromptError(
            "The model answers no benign dev prompt, so that what steering does to its answers cannot be measured: give "
            "dev prompts that it answers, too."
        )
    scored = [label for label in labels[True] if label != "unscored"]
    room = 1 - sum(label == "refusal" for label in scored) / max(1, len(scored))
    if scored and room < settings.tuning.safety_margin - 1e-9:
        raise PromptError(
            f"The model refuses {1 - room:.1%} of the harmful dev prompts, so that no setting can gain the margin of "
            f"{settings.tuning.safety_margin * 100:.3g} points: set --tuning-safety-margin {math.floor(room * 500) / 1000:g} or "
            "lower, or give harmful dev prompts that it answers, such as ones under attack."
        )


def _check_template(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], settings: FitSettings) -> None:
    """Raises RunError where a chat ends in a thought that the template has opened."""
    if not prompts:
        return
    asked = settings.collect
    end = render_chat(tokenizer, list(prompts[0].messages), system=asked.system, thinking=asked.thinking).rstrip()
    if end.endswith(("<think>", "<thinking>", "<seed:think>", "[THINK]")):
        raise RunError(
            f"The chat template ends in an opened thought ({end[-20:]!r}), and thoughts would be judged for answers: fit with "
            "--no-thinking or, where it knows no such mode, give with --chat-template a template whose prompt ends behind the "
            "thoughts, such as '<think>\\n\\n</think>'."
        )


def _check_answers(answered: Sequence[Completion]) -> None:
    """Raises RunError where most answers begin with thoughts, which say nothing of a refusal."""
    thoughts = sum(one.text.startswith(_THOUGHTS) for one in answered)
    if thoughts > len(answered) / 2:
        begin = next(one.text for one in answered if one.text.startswith(_THOUGHTS))[:40]
        raise RunError(
            f"This model thinks before it answers ({begin!r}...), and its thoughts would be judged for its answers: fit with "
            "--no-thinking or, where its template knows no such mode, give with --chat-template a template whose prompt ends "
            "behind the thoughts, such as '<think>\\n\\n</think>' or '<|channel|>final<|message|>'."
        )


def _check_trainable(model: PreTrainedModel) -> None:
    """Raises RunError where no gradient goes through the model's quantised weights."""
    quantizer = getattr(model, "hf_quantizer", None)
    if getattr(model, "is_quantized", False) and quantizer is not None and not quantizer.is_trainable:
        method = getattr(getattr(model.config, "quantization_config", None), "quant_method", "this way")
        raise RunError(
            f"No gradient goes through weights quantised by {getattr(method, 'value', method)}, so that energies cannot be "
            "trained through the model: load it unquantised, or fit with --training-refine-epochs 0."
        )


def _in_full(prompts: Sequence[Prompt], settings: FitSettings) -> list[int]:
    """Places of the prompts that are answered in full."""
    chosen = {one.id for one in sample(list(prompts), settings.collect.full_answers, settings.seed)}
    return [place for place, one in enumerate(prompts) if one.id in chosen]


def _glimpse(
    run: RunFolder,
    caches: PromptCaches,
    completions: list[Completion],
    plain: list[Completion],
    refined: list[int],
    settings: FitSettings,
    base_key: str,
    looked: tuple[int, int] | None,
    progress: Progress | None,
) -> list[Completion]:
    """`completions` and the verdicts that the first token tells of the other training prompts, in the prompts' order.

    refined: places that are trained on through the model; the prefill of these alone is kept.
    """
    found = {one.prompt_id: one for one in completions}
    places = [place for place, one in enumerate(caches.prompts) if one.id not in found]
    if not places:
        return completions
    judge = FirstTokenJudge.learn(caches.tokenizer, [*completions, *plain])
    run.stage("glimpse", base_key, ["glimpses.jsonl"])
    judge.again(run / "glimpses.jsonl")
    total, done, keep = len(places), 0, caches.keep_bytes
    for group, bytes_kept in ((refined, keep), (sorted(set(places) - set(refined)), 0)):
        caches.keep_bytes = bytes_kept

        def told(finished: int, _total: int, before: int = done) -> None:
            if progress is not None:
                progress("first tokens of more training prompts", before + finished, total)

        glimpsed = complete(
            caches,
            judge,
            max_new_tokens=1,
            places=group,
            path=run / "glimpses.jsonl",
            states=StateStore(run / "states"),
            state_tokens=settings.collect.state_tokens,
            values=looked,
            progress=told,
        )
        found |= {one.prompt_id: one for one in glimpsed}
        done += len(group)
    caches.keep_bytes = keep
    return [found[one.id] for one in caches.prompts]


def _refined_besides(prompts: Sequence[Prompt], full: list[int], settings: FitSettings) -> list[int]:
    """Places of the prompts that, besides those answered in full, are trained on through the model.

    Up to a tenth of them are under attack: where more were, steps moved everyday prompts more.
    """
    rest = sorted(set(range(len(prompts))) - set(full))
    most = max(0, settings.training.refine_prompts - len(full))
    if len(rest) <= most or not most:
        return rest[:most]
    groups: tuple[list[Prompt], list[Prompt]] = [], []
    for place in rest:
        groups[under_attack(prompts[place])].append(prompts[place])
    direct, attacked = groups
    tenth = min(len(attacked), max(most // 10, most - len(direct)))
    parts = ((direct, most - tenth), (attacked, tenth))
    chosen = {one.id for part, count in parts if count for one in sample(part, count, settings.seed)}
    return [place for place in rest if prompts[place].id in chosen]


def _caches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: FitSettings,
    run: RunFolder,
    keep_bytes: int | None = None,
) -> PromptCaches:
    collect = settings.collect
    # Training through the model takes its steps by the training prompts' batches; larger others keep an accelerator busy.
    more = 1 if keep_bytes is not None or model.device.type == "cpu" else _ON_A_GPU
    return PromptCaches(
        model,
        tokenizer,
        prompts,
        batch_size=more * collect.batch_size,
        system=collect.system,
        thinking=collect.thinking,
        room=_room(settings),
        keep_bytes=_KEEP_BYTES if keep_bytes is None else keep_bytes,
        folder=run.path,
    )


def _dev(run: RunFolder, caches: PromptCaches, settings: FitSettings, progress: Progress | None) -> list[Completion]:
    return complete(
        caches,
        judge_of_fit(settings.collect.judge),
        max_new_tokens=settings.tuning.tokens,
        path=run / "dev.jsonl",
        extra={"tokens_at_most": settings.tuning.tokens},
        states=StateStore(run / "dev_states"),
        progress=of_stage(progress, "answering the dev prompts"),
    )


def neutral_prompts(settings: FitSettings) -> list[Prompt]:
    """The everyday starter prompts on which a fit watches that the model stays as it is."""
    plain = [one for one in load_starter("dev") + load_starter("train") if one.category == DEV_NEUTRAL_CATEGORY]
    return plain[: settings.tuning.neutral_prompts]


def _tune(
    run: RunFolder,
    bases: dict[float, Landscape],
    caches: PromptCaches,
    plain: list[Completion],
    neutral: PromptCaches,
    settings: FitSettings,
    train_key: str,
    energies: dict[float, Energies],
    progress: Progress | None,
) -> tuple[Trial | None, Tuner]:
    labels = [(one.prompt_id, one.label) for one in plain]
    # Other settings to try leave the trials of those before. The words: how the bounds in the rows are reckoned.
    asked = [one.id for one in neutral.prompts], [one.source for one in caches.prompts]
    key = key_of(train_key, labels, *asked, settings.tuning.measuring(), "Sidak of all, quality spread")
    run.stage("tune", key, ["frontier.jsonl", *RESULT])
    good = [
        prompt.id
        for prompt, one in zip(caches.prompts, plain, strict=True)
        if str(outcome_of(prompt.harmful, one.label)) in DESIRABLE  # type: ignore[arg-type, operator]
    ]
    gated = any(gate is not None for gate in settings.tuning.gates)
    tuner = Tuner(
        bases,
        caches,
        plain,
        neutral,
        judge_of_fit(settings.collect.judge),
        StateStore(run / "dev_states").read(good, tokens=1)[0][:, 0] if gated else None,
        settings.tuning,
        run / "frontier.jsonl",
        progress,
    )
    aurocs = {
        weight: {layer: (found["benign"] + found["harmful"]) / 2 for layer, found in one.auroc.items()}
        for weight, one in energies.items()
    }
    return tuner.search(aurocs), tuner


def _finish(
    run: RunFolder,
    tuner: Tuner,
    trial: Trial | None,
    energies: dict[float, Energies],
    settings: FitSettings,
    command: str,
    start: Landscape | None,
) -> Landscape:
    _draw_frontier(run, tuner, trial)
    best = trial or max(
        tuner.tried.values(), key=lambda one: (one.stage != "screening", one.removed, one.stage == "quality")
    )
    landscape = tuner.landscape(best.rule)
    chosen = energies[best.rule["benign_weight"]]
    if trial is None:
        landscape = landscape.with_rule(strength=0.0)
    landscape = landscape.with_provenance(
        elsteer=elsteer.__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        seed=settings.seed,
        judge=settings.collect.judge,
        outcomes=chosen.counts,
        auroc=chosen.auroc,
        dev={**best.to_row(), "prompts": len(tuner.plain), "benign": int((~tuner.harmful).sum())},
        settings=json.loads(settings.model_dump_json()),
        **(
            {} if start is None else {"start": {"digest": start.digest(), "outcomes": start.provenance.get("outcomes")}}
        ),
    )
    landscape.save_pretrained(run / "landscape")
    if trial is None:
        broke = f"the one that removed most broke this: {' and '.join(best.why_not)}; " if best.why_not else ""
        raise NothingHelps(
            f"No setting removed false refusals without harm on the dev prompts (see {run / 'frontier.jsonl'}): {broke}the "
            "landscape was saved with strength 0; more prompts of all four outcomes are what helps most."
        )
    return landscape


def _draw_frontier(run: RunFolder, tuner: Tuner, chosen: Trial | None) -> None:
    # A setting whose answers were checked too stands twice among the trials: the later row knows all its constraints.
    judged = list({json.dumps(one.rule): one for one in tuner.trials.values() if one.stage != "screening"}.values())
    points = [
        {
            "compliance_benign": one.answered_benign,
            "refusal_harmful": one.refused_harmful,
            "label": f"layers {one.rule['layers'][0]} to {one.rule['layers'][-1]}",
            "chosen": chosen is not None and one.rule == chosen.rule,
            "feasible": one.feasible,
            "method": "els",
        }
        for one in judged
        if math.isfinite(one.answered_benign) and math.isfinite(one.refused_harmful)
    ]
    if not points:
        return
    picture = frontier_picture(points, (judged[0].plain_answered, judged[0].plain_refused), "Settings tried on dev")
    write_atomic(run / "frontier.png", lambda to: to.write_bytes(picture))
