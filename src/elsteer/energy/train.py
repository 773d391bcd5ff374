"""Training of energy models: InfoNCE over in-batch negatives, all layers at once.

For a desirable state i and the undesirable states j of the batch, with temperature T,

    loss_i = -log( exp(-E_i / T) / (exp(-E_i / T) + sum_j w_ij exp(-E_j / T)) )

averaged over i and summed over layers (the layers share no parameter, so each gets its own gradient). Source: InfoNCE,
van den Oord et al. 2018, as in ELS, arXiv 2510.08646, section 3. Batches hold as many states of each outcome. w_ij is 1
for negatives of the same kind of prompt (benign or harmful) and `across` for the other kind: steering has to tell a false
refusal from a helpful answer and a jailbreak from a safe refusal; it never has to turn one kind of prompt into the other.
Benign i weigh `benign_weight`: both halves pull on one state where prompts of the two kinds look alike, and this sets who
wins.

With settings.counterpart, half of each batch are counterparts: the state of a prompt moved `counterpart` times along the
mean difference of answered and refused prompts of its kind, and given the other outcome. So every prompt stands on both
sides of the loss, where its one verdict shows it on one side only, and the energies learn whether refusing is right from
each prompt alike. Without, batches are balanced over the four outcomes by repeating the rare.

The best epoch by validation AUROC (counterparts included) is kept for each layer by itself. AUROC is the probability that
an undesirable state has a higher energy than a desirable one: InfoNCE fixes no offset, so accuracy at some energy would
mean nothing. Those that are told are of real states alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from elsteer.energy.model import EnergyModels
from elsteer.energy.product import ProductEnergies, product_energy
from elsteer.energy.schedule import one_cycle
from elsteer.energy.standard import standardised, weighted_sums
from elsteer.errors import RunError
from elsteer.settings import TrainingSettings

__all__ = ["TrainingResult", "auroc", "harm_direction", "train"]

logger = logging.getLogger(__name__)
BENIGN_HARMFUL = {"helpful": (0, 0), "false_refusal": (0, 1), "safe_refusal": (1, 0), "jailbreak": (1, 1)}


@dataclass
class TrainingResult:
    """Trained models and, by layer, their validation AUROC: over all pairs, within benign and within harmful prompts."""

    models: EnergyModels | ProductEnergies
    auroc: dict[int, dict[str, float]]
    epochs: dict[int, int]
    counts: dict[str, int] = field(default_factory=dict)


def auroc(energies: Tensor, undesirable: Tensor) -> Tensor:
    """(L,) probabilities that an undesirable row has the higher energy; energies (n, L), undesirable (n,) bool.

    NaN where one of the two kinds is missing. Ties count a half (Mann-Whitney).
    """
    bad = undesirable.cpu().numpy().astype(bool)
    high, low = int(bad.sum()), int((~bad).sum())
    if not high or not low:
        return torch.full((energies.shape[1],), math.nan)
    ranks = rankdata(energies.cpu().numpy(), axis=0)
    return torch.from_numpy(np.asarray((ranks[bad].sum(axis=0) - high * (high + 1) / 2) / (high * low)))


def harm_direction(states: Tensor, harmful: Tensor) -> Tensor:
    """(L, d) unit vectors: mean of harmful minus mean of benign prompts' states (n, L, d); the guard's directions."""
    share = harmful.double() / harmful.sum() - (~harmful).double() / (~harmful).sum()
    difference = weighted_sums(share[None], states.flatten(1)).view(states.shape[1:])
    return (difference / difference.norm(dim=-1, keepdim=True).clamp_min(1e-12)).to(states)


def train(
    states: Tensor | Callable[[int], Tensor],
    outcomes: Sequence[str],
    groups: Sequence[str],
    layers: list[int],
    settings: TrainingSettings,
    *,
    benign_weight: float = 1.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> TrainingResult:
    """Train one energy model per layer.

    states: (n, L, d), the layers in the order of `layers`; for product energies also a function that gives the states (n, d)
    at a place of `layers` in float32, to be overwritten, so that memory holds one layer at a time. outcomes: n names. groups:
    n names, rows of one group (a prompt's tokens, a family) never stand on both sides of the validation split. Raises
    RunError where an outcome is so rare that one kind of prompt teaches nothing (fewer than 8 rows of it).
    """
    counts = {name: sum(one == name for one in outcomes) for name in BENIGN_HARMFUL}
    _require(counts)
    harmful = torch.tensor([BENIGN_HARMFUL[one][0] for one in outcomes], dtype=torch.bool)
    undesirable = torch.tensor([BENIGN_HARMFUL[one][1] for one in outcomes], dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    validation = _split(groups, outcomes, settings.validation_share, generator)
    fit_rows, check_rows = (~validation).nonzero()[:, 0], validation.nonzero()[:, 0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if settings.energy == "product":
            read = states if callable(states) else lambda at: states[:, at].float().clone().cpu()
            return _product(
                read, harmful, undesirable, fit_rows, check_rows, layers, settings, benign_weight, counts, progress
            )
        if callable(states):
            raise TypeError("networks are trained on all layers at once: give the states as a tensor")
        models = EnergyModels(
            layers,
            states.shape[-1],
            width=settings.width,
            hidden=tuple(settings.hidden),
            layer_norm=settings.layer_norm,
            dropout=settings.dropout,
        )
        models.standardise(states[fit_rows])
        best = _fit(
            models, states, harmful, undesirable, fit_rows, check_rows, settings, benign_weight, generator, progress
        )
    return TrainingResult(models, *best, counts)


def _product(
    read: Callable[[int], Tensor],
    harmful: Tensor,
    undesirable: Tensor,
    fit_rows: Tensor,
    check_rows: Tensor,
    layers: list[int],
    settings: TrainingSettings,
    benign_weight: float,
    counts: dict[str, int],
    progress: Callable[[int, int], None] | None,
) -> TrainingResult:
    """Product energies of all rows; the AUROCs are of the validation rows, by energies fitted without them."""
    refused = harmful ^ undesirable
    h, u = harmful[check_rows], undesirable[check_rows]
    seen = torch.zeros(len(harmful), dtype=torch.bool)
    seen[fit_rows] = True
    scores: dict[int, dict[str, float]] = {}
    models: ProductEnergies | None = None
    for at, layer in enumerate(layers):
        x = read(at)
        mean, scale = standardised(x)
        x.sub_(mean).div_(scale)
        models = models or ProductEnergies(layers, x.shape[1])
        for rows in (seen, None):
            models.fit_layer(
                at, x, mean, scale, harmful, refused, rows, benign_weight=benign_weight, ridge=settings.ridge
            )
            if rows is not None:
                z = torch.addmm(models.bias[at], x[check_rows], models.weight[at].T)
                energies = product_energy(z)[:, None]
                within = {"all": (energies, u), "benign": (energies[~h], u[~h]), "harmful": (energies[h], u[h])}
                scores[layer] = {name: float(auroc(*pair)[0]) for name, pair in within.items()}
        if progress is not None:
            progress(at + 1, len(layers))
    assert models is not None
    return TrainingResult(models, scores, dict.fromkeys(layers, 0), counts)


def _require(counts: dict[str, int]) -> None:
    rare = [name for name, count in counts.items() if count < 8]
    if not rare:
        return
    told = ", ".join(f"{name} {count}" for name, count in counts.items())
    if counts["false_refusal"] < 8:
        raise RunError(
            f"There is nothing to learn: the model refuses {counts['false_refusal']} of its benign training prompts "
            f"({told}; 8 of each are needed). Give benign prompts that it refuses, or leave the model as it is."
        )
    raise RunError(
        f"Too few examples to learn from: {told}, and 8 of each are needed. Add prompts of the kind that gives {rare[0]}."
    )


def _split(groups: Sequence[str], outcomes: Sequence[str], share: float, generator: torch.Generator) -> Tensor:
    names = sorted(set(groups))
    by_outcome = [torch.tensor([one == name for one in outcomes]) for name in BENIGN_HARMFUL]
    for _ in range(200):  # every outcome on both sides, else AUROC or a batch would be empty: draw until it is so
        order = torch.randperm(len(names), generator=generator).tolist()
        chosen = {names[at] for at in order[: max(1, round(share * len(names)))]}
        rows = torch.tensor([group in chosen for group in groups])
        if all(bool((mine & rows).any()) and bool((mine & ~rows).any()) for mine in by_outcome):
            return rows
    rare = min(
        BENIGN_HARMFUL, key=lambda name: len({g for g, one in zip(groups, outcomes, strict=True) if one == name})
    )
    raise RunError(f"The outcome {rare} is too rare to be split into training and validation: add prompts.")


def _fit(
    models: EnergyModels,
    states: Tensor,
    harmful: Tensor,
    undesirable: Tensor,
    fit_rows: Tensor,
    check_rows: Tensor,
    settings: TrainingSettings,
    benign_weight: float,
    generator: torch.Generator,
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[int, dict[str, float]], dict[int, int]]:
    optimiser = torch.optim.AdamW(models.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    each, ways = settings.batch_per_outcome, None
    if settings.counterpart > 0:  # each prompt gives a state of either outcome: kinds are benign and harmful
        kinds = [fit_rows[harmful[fit_rows] == h] for h in (False, True)]
        ways = settings.counterpart * _ways(states[fit_rows], harmful[fit_rows], undesirable[fit_rows])
    else:
        kinds = [
            fit_rows[(harmful[fit_rows] == h) & (undesirable[fit_rows] == u)]
            for h in (False, True)
            for u in (False, True)
        ]
    steps = max(1, round(len(fit_rows) / (len(kinds) * each)))
    schedule = one_cycle(optimiser, settings.learning_rate, steps * settings.epochs)
    best = torch.full((len(models.layers),), -1.0)
    best_epoch, best_state = torch.zeros(len(models.layers), dtype=torch.long), _copy(models)
    scores: dict[int, dict[str, float]] = {}
    waited = 0
    for epoch in range(settings.epochs):
        models.train()
        for _ in range(steps):
            rows = torch.cat([_draw(kind, each, generator) for kind in kinds])
            batch, h, u = _with_counterparts(states[rows], harmful[rows], undesirable[rows], ways)
            energies = models(batch)
            loss = _info_nce(energies, h, u, settings, benign_weight)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
        within, mean = _check(models, states, harmful, undesirable, check_rows, ways)
        better = mean > best
        waited = 0 if bool(better.any()) else waited + 1
        best = torch.where(better, mean.float(), best)
        best_epoch[better] = epoch
        _keep(best_state, models, better)
        for at in better.nonzero()[:, 0].tolist():
            scores[models.layers[at]] = {name: float(value[at]) for name, value in within.items()}
        if progress is not None:
            progress(epoch + 1, settings.epochs)
        if waited >= settings.patience:
            break
    if lost := [layer for layer in models.layers if layer not in scores]:
        raise RunError(
            f"Training gave no finite energies in layer {lost[0]}: set a lower learning rate, and check that the model's "
            "states are finite in its dtype."
        )
    models.load_state_dict(best_state)
    models.eval()
    return scores, {layer: int(best_epoch[at]) for at, layer in enumerate(models.layers)}


def _ways(states: Tensor, harmful: Tensor, undesirable: Tensor) -> Tensor:
    """(2, L, d): from the mean of the desirable to that of the undesirable states, of benign and of harmful prompts."""
    return torch.stack(
        [
            states[(harmful == kind) & undesirable].mean(dim=0) - states[(harmful == kind) & ~undesirable].mean(dim=0)
            for kind in (False, True)
        ]
    )


def _info_nce(
    energies: Tensor, harmful: Tensor, undesirable: Tensor, settings: TrainingSettings, benign_weight: float
) -> Tensor:
    logits = -energies / settings.temperature  # (n, L)
    good, bad = logits[~undesirable], logits[undesirable]
    same = harmful[~undesirable][:, None] == harmful[undesirable][None, :]
    weight = torch.where(same, 0.0, math.log(settings.across) if settings.across > 0 else -math.inf)
    negatives = torch.logsumexp(bad[None] + weight[:, :, None], dim=1)  # (positives, L)
    share = torch.where(harmful[~undesirable], 1.0, benign_weight)
    return (torch.nn.functional.softplus(negatives - good) * (share / share.mean())[:, None]).mean(dim=0).sum()


def _draw(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    if len(rows) >= count:
        return rows[torch.randperm(len(rows), generator=generator)[:count]]
    return rows[torch.randint(len(rows), (count,), generator=generator)]


@torch.no_grad()
def _check(
    models: EnergyModels,
    states: Tensor,
    harmful: Tensor,
    undesirable: Tensor,
    rows: Tensor,
    ways: Tensor | None,
) -> tuple[dict[str, Tensor], Tensor]:
    """AUROCs of the validation states by kind of pair, (L,) each, and (L,) what the best epoch is chosen by.

    That is the mean of the AUROCs within benign and within harmful prompts, over the states and their counterparts.
    """
    models.eval()
    parts = []
    for part in rows.split(256):
        batch, _, _ = _with_counterparts(states[part], harmful[part], undesirable[part], ways)
        parts.append(models(batch).unflatten(0, (-1, len(part))))
    energies = torch.cat(parts, dim=1)  # (states and their counterparts, n, L)
    h, u = harmful[rows], undesirable[rows]
    real = energies[0]
    within = {"all": auroc(real, u), "benign": auroc(real[~h], u[~h]), "harmful": auroc(real[h], u[h])}
    signs = [u, ~u][: len(energies)]
    chosen = [auroc(energies[:, kind].flatten(0, 1), torch.cat([sign[kind] for sign in signs])) for kind in (h, ~h)]
    return within, (chosen[0] + chosen[1]) / 2


def _with_counterparts(
    states: Tensor, harmful: Tensor, undesirable: Tensor, ways: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """States (n, L, d), then as many counterparts, moved by `ways` (2, L, d) to the other outcome; harmful; undesirable."""
    if ways is None:
        return states, harmful, undesirable
    moved = states + torch.where(undesirable, -1.0, 1.0)[:, None, None] * ways[harmful.long()]
    return torch.cat([states, moved]), torch.cat([harmful, harmful]), torch.cat([undesirable, ~undesirable])


def _copy(models: EnergyModels) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in models.state_dict().items()}


def _keep(kept: dict[str, Tensor], models: EnergyModels, better: Tensor) -> None:
    index = better.nonzero()[:, 0]
    for name, tensor in models.state_dict().items():
        kept[name][index] = tensor.detach()[index]
