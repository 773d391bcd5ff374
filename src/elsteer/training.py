"""The energy models of a fit: trained, kept in the run folder, read again.

The weight of the benign half sets where between fewer false refusals and more safety the energies stand; which weight is
best shows only in tuning, so there are energy models for each of `settings.training.benign_weights`, and `Tuner` chooses. Product
energies are trained for the first of them, and u's offset is shifted for the others; networks are trained for each.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from elsteer.completions import Completion, read_completions
from elsteer.energy.product import refusal_reader
from elsteer.energy.refine import SteeredProducts
from elsteer.energy.train import harm_direction, train
from elsteer.errors import RunError
from elsteer.files import read_json, write_atomic, write_json
from elsteer.judges import outcome_of
from elsteer.landscape import Landscape, SteeringRule
from elsteer.models import Fingerprint
from elsteer.prompts import Prompt
from elsteer.run import RESULT, RunFolder, key_of, of_stage
from elsteer.settings import FitSettings
from elsteer.states import StateStore

__all__ = [
    "Energies",
    "check_gates",
    "check_start",
    "context_blocks",
    "is_refined",
    "refine_band",
    "shuffled_control",
    "train_energies",
]

Progress = Callable[[str, int, int], None]
# Settings whose work a landscape to start from has behind it.
_TAKEN_OVER = ("refine_gain", "refine_units", "refine_sharpness", "refine_pooled", "context_heads")


class Through(Protocol):
    """What trains product energies through the model."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        ...

    def train(self, products: SteeredProducts, weight: float) -> object:
        """Train `products` in place, for this weight of the benign half (`elsteer.energy.refine`)."""
        ...


@dataclass
class Energies:
    """Trained energy models and guards of every layer, and their validation AUROC by layer."""

    tensors: dict[int, dict[str, Tensor]]
    guards: dict[int, Tensor]
    auroc: dict[int, dict[str, float]]
    epochs: dict[int, int]
    counts: dict[str, int]

    def landscape(self, print_of: Fingerprint) -> Landscape:
        """An untuned landscape of these energies, over all layers."""
        rule = SteeringRule(
            layers=tuple(sorted(self.tensors)), eta=0.1, steps=1, window=0, gates=None, guard=True, strength=1.0
        )
        return Landscape(rule, self.tensors, self.useful_guards(), print_of)

    def asking_for(self, ratio: float, gain: float = 1.0) -> Energies:
        """Product energies for a benign half of `ratio` times the weight: its log is taken off u, the log-odds of harm.

        gain: what these log-odds were multiplied by.
        """
        tensors = {layer: dict(found) for layer, found in self.tensors.items()}
        for found in tensors.values():
            found["bias"] = found["bias"].clone()
            found["bias"][0] -= gain * math.log(ratio)
        return dataclasses.replace(self, tensors=tensors)

    def useful_guards(self) -> dict[int, Tensor]:
        """The guards; without any direction where all prompts share one state, as in layer 0 with a fixed template end."""
        return {layer: guard[:, guard.norm(dim=0) > 0.5] for layer, guard in self.guards.items()}


def train_energies(
    run: RunFolder,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    settings: FitSettings,
    base_key: str,
    depth: int,
    progress: Progress | None = None,
    through: Through | None = None,
    start: Landscape | None = None,
) -> tuple[dict[float, Energies], str]:
    """Energies by weight of the benign half, and the key of the stage. What the run folder holds already is read.

    through: trains product energies through the model. start: the landscape whose energies are gone on with.
    """
    labels = [(one.prompt_id, one.label) for one in completions]
    training, weights = settings.training, settings.training.benign_weights
    product = training.energy == "product"
    # Other weights are no part of the key: a product's follow from the first, and each network has a folder of its own.
    names = training.model_dump(exclude={"benign_weights", "refine_memory"})
    key = key_of(base_key, labels, names, weights[0] if product else None, settings.seed, settings.shuffle_outcomes)
    key = key if start is None else key_of(key, start.digest())
    run.stage("energy", key, ["energy", *RESULT])
    if not is_refined(settings):
        through = None
    layers = range(depth) if through is None else refine_band(settings, depth)
    found: dict[float, Energies] = {}
    for weight in weights:
        if product and found:
            gain = 1.0 if through is None else training.refine_gain
            found[weight] = found[weights[0]].asking_for(weight / weights[0], gain)
            continue
        folder = run / f"energy/{weight:g}"
        if (folder / "training.json").exists():
            found[weight] = read_energies(folder)
            continue
        shuffle = settings.seed if settings.shuffle_outcomes else None
        energies = _train(run, prompts, completions, settings, layers, weight, progress, shuffle=shuffle)
        if through is not None:
            energies = _refined(run, prompts, completions, settings, energies, weight, through, depth, progress, start)
        if product:
            (run / "frontier.jsonl").unlink(missing_ok=True)  # its trials are of energies that are gone
        save_energies(folder, energies)
        found[weight] = energies
    return found, key


def check_gates(settings: FitSettings, depth: int) -> None:
    """Raises RunError where gates are to be tried and `settings` give energies that have none."""
    several = settings.training.refine_pooled or context_blocks(settings, depth) is not None
    if is_refined(settings) and several and any(gate is not None for gate in settings.tuning.gates):
        raise RunError(
            "A gate compares energies of single states, and these depend on more than one: fit with "
            "--training-context-blocks 0 and --no-training-refine-pooled, or without gates."
        )


def check_start(start: Landscape, settings: FitSettings, depth: int) -> None:
    """Raises RunError where a fit by `settings` cannot go on with the energies of `start`."""
    if not is_refined(settings):
        raise RunError(
            "Only product energies that are trained through the model go on from a landscape: leave --start out."
        )
    layers, band = start.rule.layers, list(refine_band(settings, depth))
    first = start.tensors.get(layers[0], {})
    if "length" not in first or start.method != "els":
        raise RunError("The landscape to start from was not trained through the model: leave --start out.")
    if list(layers) != band:
        raise RunError(
            f"The landscape to start from steers the blocks {layers[0]} to {layers[-1]}, and these settings train {band[0]} "
            f"to {band[-1]}: set --training-refine-band {layers[0] / depth:.4g},{(layers[-1] + 1) / depth:.4g}."
        )
    blocks = tuple(int(one) for one in first["context_blocks"].tolist()) if "context_blocks" in first else None
    if blocks != context_blocks(settings, depth):
        asked = 0 if blocks is None else blocks[1] - blocks[0]
        raise RunError(f"The landscape to start from reads other blocks: set --training-context-blocks {asked}.")
    told, asked_for = _fitted_by(start)[1], settings.training.model_dump()
    for name in _TAKEN_OVER:
        if (value := told[name]) != asked_for[name]:
            flag = f"--training-{name.replace('_', '-')}"
            flag = f"{flag} {value:g}" if not isinstance(value, bool) else flag if value else f"--no-{flag[2:]}"
            raise RunError(f"The landscape to start from was fitted by another setting that it keeps: set {flag}.")


def _fitted_by(start: Landscape) -> tuple[float, dict[str, float]]:
    """The weight of the benign half that a landscape stands for, and the settings that its energies keep."""
    told = start.provenance
    try:
        training = told["settings"]["training"]
        return float(told["dev"]["rule"]["benign_weight"]), {name: training[name] for name in _TAKEN_OVER}
    except (KeyError, TypeError, ValueError) as error:
        raise RunError("The landscape to start from does not tell how it was fitted: leave --start out.") from error


def is_refined(settings: FitSettings) -> bool:
    """Whether energies are trained through the model.

    Shuffled outcomes say nothing of single tokens, which is what that learns from.
    """
    training = settings.training
    return training.energy == "product" and training.refine_epochs > 0 and not settings.shuffle_outcomes


def context_blocks(settings: FitSettings, depth: int) -> tuple[int, int] | None:
    """The blocks, from and up to, whose values the energies read (`elsteer.energy.context`); None where they read none."""
    first = refine_band(settings, depth)[0]
    looked = min(settings.training.context_blocks, first) if is_refined(settings) else 0
    return (first - looked, first) if looked else None


def refine_band(settings: FitSettings, depth: int) -> range:
    """The blocks of `refine_band`, one at least."""
    first, stop = (round(share * depth) for share in settings.training.refine_band)
    first = min(first, depth - 1)
    return range(first, max(stop, first + 1))


def _refined(
    run: RunFolder,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    settings: FitSettings,
    energies: Energies,
    weight: float,
    through: Through,
    depth: int,
    progress: Progress | None,
    start: Landscape | None,
) -> Energies:
    """`energies`, all of neighbouring blocks, or those of `start`, trained through the model."""
    band = sorted(energies.tensors)
    guards = energies.guards if start is None else start.guards
    harm = {layer: guards[layer][:, 0] for layer in band}
    blocks = slice(band[0], band[-1] + 1)
    store, ids = StateStore(run / "states"), [one.id for one in prompts]
    harmful = torch.tensor([one.harmful for one in prompts])
    scored = torch.tensor([one.label != "unscored" for one in completions])
    refused = torch.tensor([one.label == "refusal" for one in completions])
    with run.scratch() as folder:
        states = store.read(ids, tokens=1, layers=blocks, mapped=folder / "states")[0][:, 0]
        read = context_blocks(settings, depth)
        values = None if read is None else store.values(ids, mapped=folder / "values")
        if start is not None:
            products = SteeredProducts.going_on({layer: start.tensors[layer] for layer in band}, harm)
            if values is not None:
                products.see_again(start.tensors, values)
            before, _ = _fitted_by(start)
            products.weigh(weight / before, settings.training.refine_gain)
        else:
            sharpness, reader = settings.training.refine_sharpness, None
            if sharpness:
                reader = _readers(energies.tensors, states, harmful, refused, scored, settings.training.ridge)
            products = SteeredProducts(
                energies.tensors, harm, reader=reader, sharpness=sharpness, pooled=settings.training.refine_pooled
            )
            if read is not None and values is not None:
                products.see(values, read, settings.training.context_heads, seed=settings.seed)
            products.to(through.device)
            if units := settings.training.refine_units:
                told = of_stage(progress, "training what asks whether to refuse")
                products.add_units(states, harmful, units, seed=settings.seed, progress=told)
                products.weigh(weight)  # trained on even weights u tells the kinds apart better
            products.times(settings.training.refine_gain)
        through.train(products, weight)
        products.cpu()
        tensors = products.tensors(states, harmful, refused, scored)
    guards = {layer: _guard(harm[layer], tensors[layer]) for layer in band}
    return dataclasses.replace(energies, tensors=tensors, guards=guards)


def _readers(
    tensors: dict[int, dict[str, Tensor]],
    states: Tensor,
    harmful: Tensor,
    refused: Tensor,
    scored: Tensor,
    ridge: float,
) -> tuple[Tensor, Tensor]:
    """(L, d) and (L,): the reader of each layer from states (n, L, d)."""
    found = []
    for at, layer in enumerate(sorted(tensors)):
        x = (states[:, at].float() - tensors[layer]["mean"]) / tensors[layer]["scale"]
        found.append(refusal_reader(x, harmful, refused, scored, ridge=ridge))
    return torch.stack([one for one, _ in found]), torch.stack([one for _, one in found])


def _train(
    run: RunFolder,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    settings: FitSettings,
    layers: Sequence[int],
    weight: float,
    progress: Progress | None,
    *,
    shuffle: int | None,
) -> Energies:
    """Energies of the neighbouring blocks `layers`; shuffle: the seed that outcomes are shuffled by, None for the true ones."""
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
    store = StateStore(run / "states")
    first, counts = store.read(ids, layers=slice(0, 0))  # the number of tokens, and no layer
    outcomes: list[str] = [outcome for _, outcome in scored]
    harmful = torch.tensor([prompt.harmful for prompt, _ in scored])
    if shuffle is not None:
        outcomes = shuffled(outcomes, harmful.tolist(), shuffle)
    real = torch.arange(first.shape[1])[None] < counts[:, None]
    rows, places = real.nonzero(as_tuple=True)
    groups = [scored[row][0].family or scored[row][0].id for row in rows.tolist()]
    stage = f"training the energy models, benign weight {weight:g}"
    directions: dict[int, Tensor] = {}

    def states_of(at: int, folder: Path) -> Tensor:
        """One layer's states (n, d), mapped from a file that takes no room once they are let go."""
        layer, file = layers[at], folder / f"states.{layers[at]}"
        found = store.read(ids, layers=slice(layer, layer + 1), mapped=file)[0][:, :, 0]
        with suppress(OSError):  # a system that keeps the files that are in use deletes it with the folder
            file.unlink()
        directions[layer] = harm_direction(found[:, :1], harmful)[0]
        return found[:, 0] if found.shape[1] == 1 else found[rows, places]

    def every() -> Tensor:
        found = store.read(ids, layers=slice(layers[0], layers[-1] + 1))[0]
        directions.update(zip(layers, harm_direction(found[:, 0], harmful), strict=True))
        return found[rows, places]

    with run.scratch() as folder:
        result = train(
            (lambda at: states_of(at, folder)) if settings.training.energy == "product" else every(),
            [outcomes[row] for row in rows.tolist()],
            groups,
            list(layers),
            settings.training,
            benign_weight=weight,
            seed=settings.seed,
            progress=of_stage(progress, stage),
        )
    tensors = {layer: result.models.tensors_of(at) for at, layer in enumerate(layers)}
    return Energies(
        tensors,
        {layer: _guard(directions[layer], found) for layer, found in tensors.items()},
        result.auroc,
        result.epochs,
        {name: outcomes.count(name) for name in ("helpful", "false_refusal", "safe_refusal", "jailbreak")},
    )


def _guard(direction: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """(d, k) orthonormal: the harm direction (d,), and of a product energy also the direction that tells what is due."""
    if "read_out" in tensors:
        return direction[:, None]
    due = tensors["weight"][0].double()
    columns = [one / one.norm() for one in (direction.double(), due) if float(one.norm()) > 1e-6]
    if not columns:
        return direction.new_zeros(len(direction), 0)
    return torch.linalg.qr(torch.stack(columns, dim=1)).Q.float().contiguous()


def shuffled(outcomes: list[str], harmful: list[bool], seed: int) -> list[str]:
    """Outcomes shuffled among the benign and among the harmful prompts, so that only the verdicts lose their meaning."""
    generator = random.Random(seed)
    found = list(outcomes)
    for kind in (False, True):
        places = [at for at, one in enumerate(harmful) if one == kind]
        order = generator.sample(places, len(places))
        for to, by in zip(places, order, strict=True):
            found[to] = outcomes[by]
    return found


def save_energies(folder: Path, energies: Energies) -> None:
    """Write energies.safetensors and training.json, the latter last: where it is, both are whole."""
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


def read_energies(folder: Path) -> Energies:
    """What `save_energies` wrote. Raises RunError where it is damaged."""
    try:
        flat = load_file(folder / "energies.safetensors")
        told = read_json(folder / "training.json")
        energies = Energies({}, {}, {}, {}, told["outcomes"])
        energies.auroc = {int(layer): found for layer, found in told["auroc"].items()}
        energies.epochs = {int(layer): found for layer, found in told["epochs"].items()}
        for name, tensor in flat.items():
            layer, _, rest = name.partition(".")
            if rest == "guard":
                energies.guards[int(layer)] = tensor
            else:
                energies.tensors.setdefault(int(layer), {})[rest] = tensor
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise RunError(f"{folder} is damaged: delete it and run the same command again to train anew.") from error
    return energies


def shuffled_control(
    run_dir: str | Path, landscape: Landscape, progress: Progress | None = None, *, draw: int = 0
) -> Landscape:
    """The negative control: energy models trained on shuffled outcomes, steering by the same rule (without a gate).

    draw: which of the ways to shuffle. Give several: one draw's direction can help or harm by chance.
    Reads the run folder that `landscape` was fitted in. Raises RunError where its files are not there.
    """
    run = RunFolder(run_dir)
    if not (run / "settings.yaml").exists():
        raise RunError(f"{run.path} holds no settings.yaml: give the folder that the landscape was fitted in.")
    settings = FitSettings.read(run / "settings.yaml")
    prompts = run.prompts("train")
    known = read_completions(run / "glimpses.jsonl") | read_completions(run / "completions.jsonl")
    if missing := [one.id for one in prompts if one.id not in known]:
        raise RunError(
            f"{run.path} lacks the answers of {len(missing)} training prompts: run the fit to its end first."
        )
    completions = [known[one.id] for one in prompts]
    chosen = landscape.provenance.get("dev", {}).get("rule", {})
    weight = float(chosen.get("benign_weight", settings.training.benign_weights[0]))
    steered = landscape.rule.layers
    layers = range(min(steered), max(steered) + 1)
    energies = _train(run, prompts, completions, settings, layers, weight, progress, shuffle=settings.seed + draw)
    rule = dataclasses.replace(landscape.rule, gates=None)
    about = {"settings": landscape.provenance.get("settings", {}), "control": "energies of shuffled outcomes"}
    return Landscape(rule, energies.tensors, energies.useful_guards(), landscape.fingerprint, about, method="shuffled")
