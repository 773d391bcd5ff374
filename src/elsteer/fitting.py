"""`fit`: from prompts to a landscape, stage by stage, in a run folder that can be killed at any moment and gone on with.

prompts -> completions and states -> outcomes -> energy training -> tuning on dev under the constraints -> landscape
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import elsteer
from elsteer.completions import Completion, PromptCaches, complete
from elsteer.energy.model import energy_of
from elsteer.energy.train import harm_direction, train
from elsteer.errors import NothingHelps, PromptError, RunError
from elsteer.evaluation.plots import frontier_picture
from elsteer.files import read_jsonl, write_atomic, write_json, write_jsonl
from elsteer.judges import DESIRABLE, get_judge, outcome_of
from elsteer.landscape import Landscape, SteeringRule
from elsteer.models import Fingerprint, fingerprint, num_layers
from elsteer.prompts import (
    Prompt,
    deduplicate,
    load_starter,
    require_both_classes,
    sample,
    split_prompts,
    without_near_duplicates,
)
from elsteer.run import RunFolder, key_of, told_apart
from elsteer.settings import FitSettings
from elsteer.states import StateStore
from elsteer.tuning import Trial, Tuner

__all__ = ["Energies", "fit", "shuffled_control"]

logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
DEV_NEUTRAL_CATEGORY = "plain"


@dataclass
class Energies:
    """Trained energy models and guards of every layer, and their validation AUROC by layer."""

    tensors: dict[int, dict[str, Tensor]]
    guards: dict[int, Tensor]
    auroc: dict[int, dict[str, float]]
    epochs: dict[int, int]
    counts: dict[str, int]


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    run_dir: str | Path,
    dev: Sequence[Prompt] | None = None,
    neutral: Sequence[Prompt] | None = None,
    settings: FitSettings | None = None,
    progress: Progress | None = None,
    command: str = "",
) -> Landscape:
    """Fit a landscape for `model` on `prompts` and tune it on `dev`; it is saved in run_dir/landscape and returned.

    prompts: benign ones that the model falsely refuses among them, and harmful ones. dev: prompts to tune on; without it,
    `settings.dev_share` of the prompts are set aside. Training prompts that nearly repeat a dev prompt are left out.
    neutral: everyday prompts on which the model must stay as it is; the plain starter prompts by default.
    progress(stage, done, total) is called as work goes on. Started again, `fit` goes on where it was.

    Raises PromptError, RunError (nothing to learn, folder in use, disk full) and NothingHelps: no setting removed false
    refusals without harm; the landscape was saved with strength 0.
    """
    settings = settings or FitSettings()
    run = RunFolder(run_dir)
    with run.owned():
        # What can be wrong with the prompts or the judge's name is said before anything is deleted or computed.
        get_judge(settings.collect.judge)
        train_set, dev_set = _divide(prompts, dev, settings)
        quiet = told_apart(deduplicate(neutral)) if neutral is not None else _neutral(settings)
        if not quiet:
            raise PromptError(
                "There is no neutral prompt: give some everyday ones, or None for those that are shipped."
            )
        train_caches = _caches(model, tokenizer, train_set, settings, keep_bytes=0)
        dev_caches, neutral_caches = (_caches(model, tokenizer, some, settings) for some in (dev_set, quiet))
        print_of = fingerprint(model, tokenizer, thinking=settings.collect.thinking)
        base_key = key_of(print_of.to_dict(), settings.collect.model_dump())
        _write_inputs(run, settings, train_set, dev_set)
        completions = _collect(run, train_caches, settings, base_key, progress)
        energies, train_key = _energies(run, train_set, completions, settings, base_key, num_layers(model), progress)
        plain = _dev(run, dev_caches, settings, progress)
        base = _base(energies, print_of)
        trial, tuner = _tune(run, base, dev_caches, plain, neutral_caches, settings, train_key, energies, progress)
        return _finish(run, tuner, trial, energies, settings, command)


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


def _write_inputs(run: RunFolder, settings: FitSettings, train_set: list[Prompt], dev_set: list[Prompt]) -> None:
    text = yaml.safe_dump(json.loads(settings.model_dump_json()), sort_keys=False)
    write_atomic(run / "settings.yaml", lambda to: to.write_text(text, encoding="utf-8"))
    rows = [{**one.to_row(), "split": name} for name, part in (("train", train_set), ("dev", dev_set)) for one in part]
    write_jsonl(run / "prompts.jsonl", rows)


def _told(progress: Progress | None, stage: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(stage, done, total)


def _collect(
    run: RunFolder, caches: PromptCaches, settings: FitSettings, key: str, progress: Progress | None
) -> list[Completion]:
    collect = settings.collect
    run.stage("collect", key, ["completions.jsonl", "states", "dev.jsonl", "dev_states"])
    return complete(
        caches,
        get_judge(collect.judge),
        max_new_tokens=collect.max_new_tokens,
        path=run / "completions.jsonl",
        states=StateStore(run / "states"),
        state_tokens=collect.state_tokens,
        progress=_told(progress, "answering the training prompts"),
    )


def _caches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: FitSettings,
    keep_bytes: int = 4 << 30,
) -> PromptCaches:
    collect = settings.collect
    return PromptCaches(
        model,
        tokenizer,
        prompts,
        batch_size=collect.batch_size,
        system=collect.system,
        thinking=collect.thinking,
        room=max(collect.max_new_tokens, collect.state_tokens, settings.tuning.tokens, settings.tuning.quality_tokens),
        keep_bytes=keep_bytes,
    )


def _energies(
    run: RunFolder,
    prompts: list[Prompt],
    completions: list[Completion],
    settings: FitSettings,
    base_key: str,
    depth: int,
    progress: Progress | None,
) -> tuple[Energies, str]:
    labels = [(one.prompt_id, one.label) for one in completions]
    key = key_of(base_key, labels, settings.training.model_dump(), settings.seed, settings.shuffle_outcomes)
    folder = run / "energy"
    if run.stage("energy", key, ["energy"]) and (folder / "training.json").exists():
        return _read_energies(folder), key
    energies = _train(run, prompts, completions, settings, depth, progress, shuffle=settings.shuffle_outcomes)
    _save_energies(folder, energies)
    return energies, key


def _train(
    run: RunFolder,
    prompts: list[Prompt],
    completions: list[Completion],
    settings: FitSettings,
    depth: int,
    progress: Progress | None,
    *,
    shuffle: bool,
) -> Energies:
    scored = [
        (prompt, outcome)
        for prompt, one in zip(prompts, completions, strict=True)
        if (outcome := outcome_of(prompt.harmful, one.label)) is not None  # type: ignore[arg-type]
    ]
    if not scored:
        raise RunError(
            "There is nothing to learn: every answer was empty, repetitive or garbled. Check the model and its chat template."
        )
    ids = [prompt.id for prompt, _ in scored]
    states, counts = StateStore(run / "states").read(ids)
    outcomes: list[str] = [outcome for _, outcome in scored]
    harmful = torch.tensor([prompt.harmful for prompt, _ in scored])
    if shuffle:
        outcomes = _shuffled(outcomes, harmful.tolist(), settings.seed)
    real = torch.arange(states.shape[1])[None] < counts[:, None]
    rows, tokens = real.nonzero(as_tuple=True)
    groups = [scored[row][0].family or scored[row][0].id for row in rows.tolist()]
    result = train(
        states[rows, tokens],
        [outcomes[row] for row in rows.tolist()],
        groups,
        list(range(depth)),
        settings.training,
        seed=settings.seed,
        progress=_told(progress, "training the energy models"),
    )
    directions = harm_direction(states[:, 0], harmful)
    return Energies(
        {layer: result.models.tensors_of(at) for at, layer in enumerate(result.models.layers)},
        {layer: directions[layer][:, None] for layer in range(depth)},
        result.auroc,
        result.epochs,
        {name: outcomes.count(name) for name in ("helpful", "false_refusal", "safe_refusal", "jailbreak")},
    )


def _shuffled(outcomes: list[str], harmful: list[bool], seed: int) -> list[str]:
    """Outcomes shuffled among the benign and among the harmful prompts, so that only the verdicts lose their meaning."""
    generator = random.Random(seed)
    shuffled = list(outcomes)
    for kind in (False, True):
        places = [at for at, one in enumerate(harmful) if one == kind]
        order = generator.sample(places, len(places))
        for to, by in zip(places, order, strict=True):
            shuffled[to] = outcomes[by]
    return shuffled


def _save_energies(folder: Path, energies: Energies) -> None:
    tensors = {
        f"{layer}.{name}": tensor.contiguous()
        for layer, found in energies.tensors.items()
        for name, tensor in found.items()
    }
    tensors |= {f"{layer}.guard": guard.contiguous() for layer, guard in energies.guards.items()}
    whole = save(tensors)  # not save_file: a full disk would come as an error of its own, and not as RunError
    write_atomic(folder / "energies.safetensors", lambda to: to.write_bytes(whole))
    write_json(
        folder / "training.json", {"auroc": energies.auroc, "epochs": energies.epochs, "outcomes": energies.counts}
    )


def _read_energies(folder: Path) -> Energies:
    try:
        flat = load_file(folder / "energies.safetensors")
        told = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        energies = Energies({}, {}, {}, {}, told["outcomes"])
        energies.auroc = {int(layer): found for layer, found in told["auroc"].items()}
        energies.epochs = {int(layer): found for layer, found in told["epochs"].items()}
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise RunError(f"{folder} is damaged: delete it and run the same command again to train anew.") from error
    for name, tensor in flat.items():
        layer, _, rest = name.partition(".")
        if rest == "guard":
            energies.guards[int(layer)] = tensor
        else:
            energies.tensors.setdefault(int(layer), {})[rest] = tensor
    return energies


def _dev(run: RunFolder, caches: PromptCaches, settings: FitSettings, progress: Progress | None) -> list[Completion]:
    return complete(
        caches,
        get_judge(settings.collect.judge),
        max_new_tokens=settings.tuning.tokens,
        path=run / "dev.jsonl",
        extra={"tokens_at_most": settings.tuning.tokens},
        states=StateStore(run / "dev_states"),
        progress=_told(progress, "answering the dev prompts"),
    )


def _neutral(settings: FitSettings) -> list[Prompt]:
    plain = [one for one in load_starter("dev") + load_starter("train") if one.category == DEV_NEUTRAL_CATEGORY]
    return plain[: settings.tuning.neutral_prompts]


def _base(energies: Energies, print_of: Fingerprint) -> Landscape:
    rule = SteeringRule(
        layers=tuple(sorted(energies.tensors)),
        eta=0.1,
        steps=1,
        window=0,
        gates=None,
        guard=True,
        strength=1.0,
    )
    return Landscape(rule, energies.tensors, _guards(energies), print_of)


def _guards(energies: Energies) -> dict[int, Tensor]:
    """The guards; without any direction where all prompts share one state, as all templates' last tokens do in layer 0."""
    return {layer: guard[:, guard.norm(dim=0) > 0.5] for layer, guard in energies.guards.items()}


def _tune(
    run: RunFolder,
    base: Landscape,
    caches: PromptCaches,
    plain: list[Completion],
    neutral: PromptCaches,
    settings: FitSettings,
    train_key: str,
    energies: Energies,
    progress: Progress | None,
) -> tuple[Trial | None, Tuner]:
    labels = [(one.prompt_id, one.label) for one in plain]
    key = key_of(train_key, labels, [one.id for one in neutral.prompts], settings.tuning.model_dump())
    run.stage("tune", key, ["frontier.jsonl"])
    benign = {one.label for one, prompt in zip(plain, caches.prompts, strict=True) if not prompt.harmful}
    if "refusal" not in benign:
        raise PromptError(
            "The model refuses no benign dev prompt: there is nothing to tune; give dev prompts that it refuses."
        )
    if "compliance" not in benign:
        raise PromptError(
            "The model answers no benign dev prompt, so that what steering does to its answers cannot be measured: give "
            "dev prompts that it answers, too."
        )
    gates = _gates(run, energies, caches.prompts, plain)
    tuner = Tuner(
        base,
        caches,
        plain,
        neutral,
        get_judge(settings.collect.judge),
        gates,
        settings.tuning,
        run / "frontier.jsonl",
        progress,
    )
    mean = {layer: (found["benign"] + found["harmful"]) / 2 for layer, found in energies.auroc.items()}
    return tuner.search(mean), tuner


def _gates(
    run: RunFolder, energies: Energies, prompts: Sequence[Prompt], plain: Sequence[Completion]
) -> Callable[[int, float], float]:
    good = [
        prompt.id
        for prompt, one in zip(prompts, plain, strict=True)
        if str(outcome_of(prompt.harmful, one.label)) in DESIRABLE  # type: ignore[arg-type, operator]
    ]
    states = StateStore(run / "dev_states").read(good, tokens=1)[0][:, 0]

    def gate(layer: int, share: float) -> float:
        tensors = energies.tensors[layer]
        x = (states[:, layer] - tensors["mean"]) / tensors["scale"]
        z = torch.nn.functional.linear(x, tensors["weight"], tensors["bias"])
        return float(energy_of(tensors, z).quantile(share))

    return gate


def _finish(
    run: RunFolder,
    tuner: Tuner,
    trial: Trial | None,
    energies: Energies,
    settings: FitSettings,
    command: str,
) -> Landscape:
    _draw_frontier(run, tuner, trial)
    best = trial or max(tuner.trials.values(), key=lambda one: (one.stage != "screening", one.removed))
    landscape = tuner.landscape(best.rule)
    if trial is None:
        landscape = landscape.with_rule(strength=0.0)
    landscape = landscape.with_provenance(
        elsteer=elsteer.__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        seed=settings.seed,
        judge=settings.collect.judge,
        outcomes=energies.counts,
        auroc=energies.auroc,
        dev={**best.to_row(), "prompts": len(tuner.plain), "benign": int((~tuner.harmful).sum())},
        settings=json.loads(settings.model_dump_json()),
    )
    landscape.save_pretrained(run / "landscape")
    if trial is None:
        raise NothingHelps(
            f"No setting removed false refusals without harm on the dev prompts (see {run / 'frontier.jsonl'}): the landscape "
            "was saved with strength 0; more prompts of all four outcomes are what helps most."
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


def shuffled_control(run_dir: str | Path, landscape: Landscape, progress: Progress | None = None) -> Landscape:
    """The negative control: energy models trained on shuffled outcomes, steering by the same rule (without a gate).

    Reads the run folder that `landscape` was fitted in. Raises RunError where its files are not there.
    """
    run = RunFolder(run_dir)
    if not (run / "settings.yaml").exists():
        raise RunError(f"{run.path} holds no settings.yaml: give the folder that the landscape was fitted in.")
    settings = FitSettings.model_validate(yaml.safe_load((run / "settings.yaml").read_text(encoding="utf-8")))
    prompts = [
        Prompt.from_row({name: value for name, value in row.items() if name != "split"})
        for row in read_jsonl(run / "prompts.jsonl")
        if row["split"] == "train"
    ]
    names = Completion.__dataclass_fields__
    known = {
        row["prompt_id"]: Completion(**{n: row[n] for n in names}) for row in read_jsonl(run / "completions.jsonl")
    }
    if missing := [one.id for one in prompts if one.id not in known]:
        raise RunError(
            f"{run.path} lacks the answers of {len(missing)} training prompts: run the fit to its end first."
        )
    completions = [known[one.id] for one in prompts]
    energies = _train(run, prompts, completions, settings, landscape.fingerprint.num_layers, progress, shuffle=True)
    rule = dataclasses.replace(landscape.rule, gates=None)
    about = {"settings": landscape.provenance.get("settings", {}), "control": "energies of shuffled outcomes"}
    return Landscape(rule, energies.tensors, _guards(energies), landscape.fingerprint, about, method="shuffled")
