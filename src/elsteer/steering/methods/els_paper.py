"""`els-paper`: energy steering as it was published, with the defects of the published code mended.

    E(h): Linear, LayerNorm, SiLU, Dropout 0.15 at widths 2048, 1024, 1024, 512, then Linear to 1, on raw float32 states
    h <- h - eta * g / (|g| + 1e-8),    g = grad E(h),    K times, in the N layers of best validation AUROC, at every token

E is trained by InfoNCE, with energies over temperature 0.10 and the undesirable states of the batch (false refusals and
jailbreaks) as negatives of each desirable one; Adam at 5e-5, 64 pairs a batch, 120 epochs, 80/20. Source: arXiv 2510.08646 and
its published code. eta is in raw units of the state, of one layer, as published; 0.95 and 3 or 10
steps are the paper's for larger models, and shorter steps are tuned.

Mended: the verdicts are of whole answers; states are of chats templated once; pairs are drawn anew each epoch from all four
outcomes (at most a quarter of `prompts` each), not cut in list order; layers and the epoch are chosen by AUROC, which needs no
offset of the energy, and the best epoch is the one that steers; dropout is off while steering; the step is float32; everything
is seeded. The gradient is written out, which gives autograd's to rounding and works in inference mode.

`els-paper-small` is the same at widths 512, 256, 256, 128: for comparisons on a CPU. Training takes minutes per layer there at
the published widths. A layer that is trained is kept in `Evidence.folder` and not trained again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from elsteer.energy.model import EPSILON
from elsteer.energy.product import silu_slope
from elsteer.energy.train import auroc
from elsteer.errors import RunError
from elsteer.files import write_atomic
from elsteer.steering.evidence import OUTCOMES, Evidence
from elsteer.steering.methods.baseline import Baseline, Candidate
from elsteer.steering.methods.layers import EVERY_TOKEN, per_row

__all__ = ["ELS_PAPER", "ELS_PAPER_SMALL", "PaperNetwork", "PaperSteps", "els_paper", "train_network"]

logger = logging.getLogger(__name__)

PUBLISHED, SMALL = (2048, 1024, 1024, 512), (512, 256, 256, 128)
ETAS = (0.1, 0.15, 0.2, 0.3, 0.5, 0.95)
DROPOUT, TEMPERATURE, RATE, PAIRS, EPOCHS, VALIDATION, PROMPTS = 0.15, 0.10, 5e-5, 64, 120, 0.2, 2000
TINY = 1e-8


class PaperNetwork(nn.Module):
    """E and its gradient, of one layer. tensors: as `train_network` gives them; all are buffers."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.depth = sum(name.startswith("weight.") for name in tensors) - 1
        for name, tensor in tensors.items():
            self.register_buffer(name.replace(".", "_"), tensor.detach().float())

    def _get(self, name: str, at: int) -> Tensor:
        found: Tensor = getattr(self, f"{name}_{at}")
        return found

    def _forward(self, states: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
        a, kept = states.float(), []
        for at in range(self.depth):
            z = F.linear(a, self._get("weight", at), self._get("bias", at))
            centred = z - z.mean(dim=-1, keepdim=True)
            deviation = (centred.square().mean(dim=-1, keepdim=True) + EPSILON).sqrt()
            normal = centred / deviation
            u = normal * self._get("norm_weight", at) + self._get("norm_bias", at)
            kept.append((u, normal, deviation))
            a = F.silu(u)
        return F.linear(a, self._get("weight", self.depth), self._get("bias", self.depth))[:, 0], kept

    def energy(self, states: Tensor) -> Tensor:
        """(n,) energies of states (n, d)."""
        return self._forward(states)[0]

    def gradient(self, states: Tensor) -> Tensor:
        """(n, d) gradients of the energies of states (n, d), without autograd."""
        _, kept = self._forward(states)
        g = self._get("weight", self.depth).expand(len(states), -1)
        for at in reversed(range(self.depth)):
            u, normal, deviation = kept[at]
            g = g * silu_slope(u) * self._get("norm_weight", at)
            along = (g * normal).mean(dim=-1, keepdim=True)
            g = (g - g.mean(dim=-1, keepdim=True) - normal * along) / deviation
            g = g @ self._get("weight", at)
        return g


class PaperSteps(nn.Module):
    """K steps of length `eta`, in raw units, down the energy of `network`, which candidates share."""

    def __init__(self, network: PaperNetwork, *, eta: float, steps: int) -> None:
        super().__init__()
        self.network, self.eta, self.steps = network, eta, steps

    def delta(self, states: Tensor, strength: Tensor | float = 1.0) -> Tensor:
        """(n, d) float32 to add to states (n, d); strength: one number or (n,), multiplies eta."""
        start = states.float()
        length, total = self.eta * per_row(strength, states), torch.zeros_like(start)
        for _ in range(self.steps):
            g = self.network.gradient(start + total)
            total = total - length * g / (g.norm(dim=-1, keepdim=True) + TINY)
        return total


def train_network(
    states: Tensor,
    undesirable: Tensor,
    *,
    widths: Sequence[int] = PUBLISHED,
    epochs: int = EPOCHS,
    rate: float = RATE,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, Tensor], float]:
    """Train on states (n, d) and undesirable (n,) bool; the tensors of the best epoch and its validation AUROC.

    Raises RunError where fewer than 5 states are desirable or undesirable, or no epoch gave finite energies.
    """
    if min(int(undesirable.sum()), int((~undesirable).sum())) < 5:
        raise RunError(
            "els-paper needs 5 desirable and 5 undesirable answers at least to learn from: give more prompts."
        )
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sides = []
        for kind in (False, True):
            rows = (undesirable == kind).nonzero()[:, 0]
            sides.append(rows[torch.randperm(len(rows))])
        held = [max(1, round(VALIDATION * len(rows))) for rows in sides]
        check = torch.cat([rows[:count] for rows, count in zip(sides, held, strict=True)])
        good, bad = (states[rows[count:]].float().to(device) for rows, count in zip(sides, held, strict=True))
        x, y = states[check].float().to(device), undesirable[check]
        network = _sequential(states.shape[1], widths).to(device)
        optimiser = torch.optim.Adam(network.parameters(), lr=rate, fused=True)  # a third faster on a CPU
        best, kept = -1.0, None
        pairs = min(len(good), len(bad))
        for _ in range(epochs):
            network.train()
            mine, theirs = torch.randperm(len(good))[:pairs], torch.randperm(len(bad))[:pairs]
            for first, second in zip(mine.split(PAIRS), theirs.split(PAIRS), strict=True):
                energies = network(torch.cat([good[first], bad[second]]))[:, 0] / -TEMPERATURE
                negatives = torch.logsumexp(energies[len(first) :], dim=0)
                loss = F.softplus(negatives - energies[: len(first)]).mean()
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
            network.eval()
            with torch.no_grad():
                energies = network(x).cpu()
            score = float(auroc(energies, y)[0]) if bool(torch.isfinite(energies).all()) else -1.0
            if score > best:
                best, kept = score, _tensors(network)
    if kept is None:
        raise RunError("els-paper's training gave no finite energies: check that the model's states are finite.")
    return kept, best


def _sequential(size: int, widths: Sequence[int]) -> nn.Sequential:
    parts: list[nn.Module] = []
    for into, out in pairwise((size, *widths)):
        parts += [nn.Linear(into, out), nn.LayerNorm(out, eps=EPSILON), nn.SiLU(), nn.Dropout(DROPOUT)]
    return nn.Sequential(*parts, nn.Linear(widths[-1], 1))


def _tensors(network: nn.Sequential) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    at = 0
    for part in network:
        if isinstance(part, nn.LayerNorm):
            found |= {f"norm_weight.{at - 1}": part.weight, f"norm_bias.{at - 1}": part.bias}
        elif isinstance(part, nn.Linear):
            found |= {f"weight.{at}": part.weight, f"bias.{at}": part.bias}
            at += 1
    return {name: tensor.detach().cpu().clone() for name, tensor in found.items()}


def els_paper(name: str = "els-paper", widths: Sequence[int] = PUBLISHED, *, epochs: int = EPOCHS) -> Baseline:
    """The baseline at these widths, trained on a GPU where there is one."""

    def candidates(evidence: Evidence) -> list[Candidate]:
        return _candidates(evidence, name, tuple(widths), epochs)

    title = f"Energy steering as published, widths {', '.join(map(str, widths))}"
    return Baseline(name, title, candidates)


def _candidates(evidence: Evidence, name: str, widths: tuple[int, ...], epochs: int) -> list[Candidate]:
    on = "cuda" if torch.cuda.is_available() else "cpu"
    rows, undesirable = _sample(evidence, PROMPTS)
    networks, scores = {}, {}
    for layer in range(evidence.depth):

        def trained(layer: int = layer) -> tuple[dict[str, Tensor], float]:
            states = evidence.states(layer)[rows]
            seed = evidence.seed + layer
            return train_network(states, undesirable, widths=widths, epochs=epochs, seed=seed, device=on)

        made_of = f"{widths} {epochs} {PROMPTS} {evidence.digest()}"
        path = None if evidence.folder is None else evidence.folder / name / f"{layer}.safetensors"
        tensors, scores[layer] = _kept(path, made_of, trained)
        networks[layer] = PaperNetwork(tensors)
        logger.info("%s: layer %d of %d, validation AUROC %.3f", name, layer + 1, evidence.depth, scores[layer])
    ranked = sorted(scores, key=lambda layer: (-scores[layer], layer))
    found = []
    plan = [(3, EVERY_TOKEN), (3, 0)]  # K, window
    for count in dict.fromkeys(min(count, evidence.depth) for count in (3, 12)):
        layers = sorted(ranked[:count])
        for steps, window in plan:
            for eta in ETAS:
                moves = {at: PaperSteps(networks[at], eta=eta, steps=steps) for at in layers}
                settings = {"layers": layers, "eta": eta, "steps": steps, "window": window}
                found.append(Candidate(name, settings, moves, window))
    return found


def _sample(evidence: Evidence, prompts: int) -> tuple[Tensor, Tensor]:
    """Rows (m,) and whether they are undesirable (m,) bool: of each outcome as many as there are, up to a quarter."""
    generator = torch.Generator().manual_seed(evidence.seed)
    rows = []
    for outcome in OUTCOMES:
        known = evidence.rows(outcome).nonzero()[:, 0]
        rows.append(known[torch.randperm(len(known), generator=generator)[: prompts // len(OUTCOMES)]])
    chosen = torch.cat(rows)
    return chosen, evidence.harmful[chosen] != evidence.refused[chosen]


def _kept(
    path: Path | None, made_of: str, trained: Callable[[], tuple[dict[str, Tensor], float]]
) -> tuple[dict[str, Tensor], float]:
    """What `path` holds, if that was made of the same; else what `trained` gives, written there."""
    if path is not None and path.exists():
        try:
            with safe_open(path, "pt") as file:
                known = file.metadata() or {}
                if known.get("made_of") == made_of:
                    return {name: file.get_tensor(name) for name in file.keys()}, float(known["auroc"])  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise RunError(f"{path} is damaged: delete it, and its layer is trained again.") from error
    tensors, score = trained()
    if path is not None:
        whole = save(tensors, metadata={"made_of": made_of, "auroc": repr(score)})
        write_atomic(path, lambda temporary: temporary.write_bytes(whole))
    return tensors, score


ELS_PAPER = els_paper()
ELS_PAPER_SMALL = els_paper("els-paper-small", SMALL)
