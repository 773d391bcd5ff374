"""Training the energies: all layers at once, one after the other, and the paper's network and loop, on the same states.

    .venv/bin/python benchmarks/bench_train.py

States are synthetic (two directions carry harm and refusal, in noise). The paper: its network for each layer in turn, Adam, 64
pairs a batch, a Python loop over the positives of a batch; timed for a few epochs and multiplied up to its 120, which the
note says. `train.ratio` is the paper's time over that of the default (product) energy, with the AUROC of both.
"""

from __future__ import annotations

import time

import torch
from bench_descent import PaperEnergy
from side_by_side import keep, show
from torch import Tensor

from elsteer.energy.train import auroc, train
from elsteer.evaluation.figures import Figure, machine
from elsteer.settings import TrainingSettings

COMMAND = "python benchmarks/bench_train.py"
SIZE, EACH, EPOCHS, TIMED = 896, 250, 120, 2
OUTCOMES = ("helpful", "false_refusal", "safe_refusal", "jailbreak")


def synthetic(layers: int, seed: int = 0) -> tuple[Tensor, list[str]]:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(4 * EACH, layers, SIZE, generator=generator)
    outcomes = [name for name in OUTCOMES for _ in range(EACH)]
    harmful = torch.tensor([name in ("safe_refusal", "jailbreak") for name in outcomes])
    refused = torch.tensor([name in ("false_refusal", "safe_refusal") for name in outcomes])
    states[:, :, 0] += 4.0 * harmful[:, None]
    states[:, :, 1] += 4.0 * refused[:, None]
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
        "network": TrainingSettings(energy="network", epochs=20, patience=20),
    }
    table, figures = [], []
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
        start = time.perf_counter()
        fresh, labels = synthetic(1, seed=1)
        model = paper_layer(states[:, 0], good, TIMED)
        times["paper"] = (time.perf_counter() - start) / TIMED * EPOCHS * layers
        with torch.inference_mode():
            bad = torch.tensor([name in ("false_refusal", "jailbreak") for name in labels])
            found["paper"] = float(auroc(model(fresh[:, 0]), bad)[0])
        for name, value in times.items():
            score = f"{found[name]:.3f}" if name in found else ""
            table.append([layers, name, f"{value:.1f}", f"{times['paper'] / value:.1f}", score])
        note = (
            f"paper's loop ({TIMED} of {EPOCHS} epochs of one of {layers} layers timed, multiplied up) over the product energy, "
            f"all layers at once; AUROC {found['product, all at once']:.3f}"
        )
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
    show(["layers", "training", "seconds", "times faster than the paper's", "AUROC"], table)
    keep("train", figures)


if __name__ == "__main__":
    main()
