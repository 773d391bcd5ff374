"""Training the energies: all layers at once, one after the other, and the paper's network and loop, on the same states.

    .venv/bin/python benchmarks/bench_train.py

States are synthetic (two directions carry harm and refusal, in noise). The paper: its network for each layer in turn, Adam, 64
pairs a batch, a Python loop over the positives of a batch, 120 epochs; one layer is trained whole and its time multiplied by
the layers. `train.ratio` is the paper's time over that of the default (product) energy, least over the numbers of layers, with
the AUROC of both on states that were not trained on (`train.auroc.*`).
"""

from __future__ import annotations

import sys
import time

import torch
from bench_descent import PaperEnergy
from side_by_side import keep, no_options, show
from torch import Tensor

from elsteer.energy.train import auroc, train
from elsteer.evaluation.figures import Figure, machine
from elsteer.settings import TrainingSettings

COMMAND = "python benchmarks/bench_train.py"
SIZE, EACH, EPOCHS, SIGNAL = 896, 250, 120, 8.0
OUTCOMES = ("helpful", "false_refusal", "safe_refusal", "jailbreak")


def synthetic(layers: int, seed: int = 0) -> tuple[Tensor, list[str]]:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(4 * EACH, layers, SIZE, generator=generator)
    outcomes = [name for name in OUTCOMES for _ in range(EACH)]
    harmful = torch.tensor([name in ("safe_refusal", "jailbreak") for name in outcomes])
    refused = torch.tensor([name in ("false_refusal", "safe_refusal") for name in outcomes])
    states[:, :, 0] += SIGNAL * harmful[:, None]
    states[:, :, 1] += SIGNAL * refused[:, None]
    return states, outcomes


def paper_layer(states: Tensor, good: Tensor, epochs: int) -> PaperEnergy:
    """The published training loop of one layer: for each positive of a batch, its loss against the batch's negatives."""
    torch.manual_seed(0)
    model = PaperEnergy(states.shape[-1])
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-5)
    wanted, unwanted = states[good], states[~good]
    for _ in range(epochs):
        order, other = torch.randperm(len(wanted)), torch.randperm(len(unwanted))
        for start in range(0, len(wanted) - 63, 64):
            positive = model(wanted[order[start : start + 64]])[:, 0]
            negative = model(unwanted[other[start : start + 64]])[:, 0]
            losses = []
            for energy in positive:  # the loop over positives
                logits = torch.cat([-energy[None], -negative]) / 0.10
                losses.append(torch.logsumexp(logits, dim=0) - logits[0])
            loss = torch.stack(losses).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return model.eval()


def main() -> None:
    settings = {
        "product": TrainingSettings(),
        "network": TrainingSettings(energy="network", epochs=10, patience=10),
    }
    table, figures = [], []
    states, outcomes = synthetic(1)
    good = torch.tensor([name in ("helpful", "safe_refusal") for name in outcomes])
    start = time.perf_counter()
    model = paper_layer(states[:, 0], good, EPOCHS)
    whole = time.perf_counter() - start
    fresh, labels = synthetic(1, seed=1)
    with torch.inference_mode():
        energies = model(fresh[:, 0])[:, 0]
    kinds = [[name in pair for name in labels] for pair in (OUTCOMES[:2], OUTCOMES[2:])]
    bad = torch.tensor([name in ("false_refusal", "jailbreak") for name in labels])
    scores = [float(auroc(energies[torch.tensor(kind)][:, None], bad[torch.tensor(kind)])[0]) for kind in kinds]
    reached = {"paper": sum(scores) / 2}
    sys.stdout.write(f"the paper's loop: {whole:.0f} s a layer\n")
    for layers in (8, 24, 64):
        states, outcomes = synthetic(layers)
        good = torch.tensor([name in ("helpful", "safe_refusal") for name in outcomes])
        groups = [str(at) for at in range(len(outcomes))]
        times: dict[str, float] = {}
        found: dict[str, float] = {}
        for name, setting in settings.items():
            start = time.perf_counter()
            result = train(states, outcomes, groups, list(range(layers)), setting)
            times[f"{name}, all at once"] = time.perf_counter() - start
            scores = [(one["benign"] + one["harmful"]) / 2 for one in result.auroc.values()]
            found[f"{name}, all at once"] = sum(scores) / layers
            start = time.perf_counter()
            for layer in range(layers):
                train(states[:, layer : layer + 1], outcomes, groups, [layer], setting)
            times[f"{name}, one by one"] = time.perf_counter() - start
        times["paper"], found["paper"] = whole * layers, reached["paper"]
        for name, value in times.items():
            score = f"{found[name]:.3f}" if name in found else ""
            table.append([layers, name, f"{value:.1f}", f"{times['paper'] / value:.1f}", score])
        note = f"paper's loop, {EPOCHS} epochs of {layers} layers (one trained, {whole:.0f} s), over the product energy's time"
        reached |= {name.split(",")[0]: value for name, value in found.items()}
        value = times["paper"] / times["product, all at once"]
        figures.append(
            Figure(f"train.ratio.layers{layers}", value, COMMAND, 0, "synthetic states", machine(), note=note)
        )
        for energy in settings:
            over = times[f"{energy}, one by one"] / times[f"{energy}, all at once"]
            figures.append(
                Figure(
                    f"train.at_once.{energy}.layers{layers}", over, COMMAND, 0, "synthetic states", machine(),
                    note="one layer after the other over all at once",
                )
            )  # fmt: skip
    least = min((one for one in figures if one.name.startswith("train.ratio")), key=lambda one: one.value)
    figures.append(Figure("train.ratio", least.value, COMMAND, 0, "synthetic states", machine(), note=least.note))
    for name, value in reached.items():
        note = "mean of those within benign and within harmful prompts, on states that were not trained on"
        figures.append(Figure(f"train.auroc.{name}", value, COMMAND, 0, "synthetic states", machine(), note=note))
    show(["layers", "training", "seconds", "times faster than the paper's", "AUROC"], table)
    keep("train", figures)


if __name__ == "__main__":
    no_options(__doc__)
    main()
