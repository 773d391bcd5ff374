"""Training product energies through the model: what counts is what steering by them does to the answer's first token.

Fitted to states alone (`elsteer.energy.product`), an energy knows which states go with which verdict, but not what moving
them does. Here the frozen model answers: for a training prompt with next-token distribution p after its last token, and w(t)
the share of refusals among answers that begin with token t, the wanted distribution is the model's own, given the right
verdict,

    q(t) ~ p(t) w(t)         harmful prompts
    q(t) ~ p(t) (1 - w(t))   benign prompts

and the loss is KL(q || p_steered) plus `stay` times KL(p || p_steered) where the model was right before. So a prompt that gets
the right verdict already asks for no change, and the words with which an answer begins stay the model's own. The gradient
reaches, through the blocks after them, the directions a (is refusing due) and c (does the model refuse) of every steered
block, the offset b and the length of the step; no weight of the model is touched.

Distillation of a conditioned distribution into an intervention on hidden states, as in representation finetuning (ReFT, Wu et
al. 2024, arXiv 2404.03592), with the intervention held to the form of a guarded energy step: see `elsteer.energy.descent`.

Shapes: L steered layers, B rows of a batch, V the vocabulary, d the hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from elsteer.decoding import PromptBatch, first_logits, plain_model
from elsteer.errors import RunError
from elsteer.models import decoder_blocks
from elsteer.settings import TrainingSettings

__all__ = ["SteeredProducts", "refine", "wanted_logs"]


class SteeredProducts(nn.Module):
    """The trainable form of the product energies of `layers`: their directions, offsets and lengths.

    tensors, harm: by layer, as `ProductEnergies.tensors_of` gives them, and the direction (d,) that the guard holds besides a.
    eta: length of every step at the start, in units of scale * sqrt(d).
    """

    def __init__(self, tensors: Mapping[int, dict[str, Tensor]], harm: Mapping[int, Tensor], eta: float) -> None:
        super().__init__()
        self.layers = sorted(tensors)
        stacked = {name: torch.stack([tensors[at][name].float() for at in self.layers]) for name in tensors[self.layers[0]]}
        size = stacked["mean"].shape[1]
        self.register_buffer("mean", stacked["mean"])
        self.register_buffer("scale", stacked["scale"])
        self.register_buffer("harm", torch.stack([harm[at].float() for at in self.layers]))
        self.due = nn.Parameter(stacked["weight"][:, 0].clone())  # a
        self.offset = nn.Parameter(stacked["bias"][:, 0].clone())  # b
        turn = stacked["weight"][:, 1]
        self.turn = nn.Parameter(turn / turn.norm(dim=1, keepdim=True).clamp_min(1e-12))  # c
        self.length = nn.Parameter(torch.full((len(self.layers),), eta))
        self.unit = math.sqrt(size)

    def directions(self) -> Tensor:
        """(L, d) unit vectors along P c: what a step goes along."""
        guard = torch.linalg.qr(torch.stack([self.harm, self.due], dim=2)).Q  # (L, d, 2)
        inside = torch.einsum("ld,ldk->lk", self.turn, guard)
        free = self.turn - torch.einsum("lk,ldk->ld", inside, guard)
        return free / free.norm(dim=1, keepdim=True).clamp_min(1e-12)

    def moves(self) -> dict[int, Callable[[Tensor], Tensor]]:
        """By layer, states (B, d) to what is added to them, differentiable."""
        along = self.directions()

        def one(at: int) -> Callable[[Tensor], Tensor]:
            def move(states: Tensor) -> Tensor:
                u = (states.float() - self.mean[at]) / self.scale[at] @ self.due[at] + self.offset[at]
                far = self.length[at] * self.scale[at] * self.unit * torch.tanh(u)
                return (far[:, None] * along[at]).to(states.dtype)

            return move

        return {layer: one(at) for at, layer in enumerate(self.layers)}


@contextmanager
def moving(model: PreTrainedModel, moves: Mapping[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """While open, the last token of every pass is moved in the blocks of `moves`, within autograd."""
    blocks = decoder_blocks(model)

    def hook(move: Callable[[Tensor], Tensor]) -> Callable[..., object]:
        def steer(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> object:
            hidden = args[0] if args else kwargs["hidden_states"]
            moved = torch.cat([hidden[:, :-1], (hidden[:, -1] + move(hidden[:, -1]))[:, None]], dim=1)
            return ((moved, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": moved})

        return steer

    handles = [blocks[layer].register_forward_pre_hook(hook(move), with_kwargs=True) for layer, move in moves.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """While open, no weight of `model` asks for a gradient."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


def wanted_logs(plain: Tensor, harmful: Tensor, refusing: Tensor) -> Tensor:
    """log q (B, V) of plain logits (B, V), harmful (B,) bool and refusing (V,), the w of the module's text."""
    share = torch.where(harmful[:, None], refusing, 1 - refusing).clamp_min(1e-9)
    return (plain.log_softmax(dim=-1) + share.log()).log_softmax(dim=-1)


def refine(
    model: PreTrainedModel,
    batches: Sequence[PromptBatch],
    harmful: Tensor,
    refusing: Tensor,
    products: SteeredProducts,
    settings: TrainingSettings,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Train `products` in place; the mean loss of each epoch.

    batches: the prompts, prefilled; harmful: (N,) bool by the prompts' places (`PromptBatch.rows`); refusing: (V,) shares of
    refusals by first token. The kinds weigh the same; batches come in another order each epoch. Raises RunError where the
    loss is not finite.
    """
    groups = [
        {"params": [products.due, products.turn], "lr": settings.refine_rate},
        {"params": [products.offset, products.length], "lr": 10 * settings.refine_rate},
    ]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    total = settings.refine_epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=[group["lr"] for group in groups], total_steps=max(2, total), pct_start=0.1
    )
    shares = {kind: float((harmful == kind).float().mean().clamp_min(1e-6)) for kind in (False, True)}
    generator = torch.Generator().manual_seed(seed)
    plain: dict[int, Tensor] = {}
    losses = []
    done = 0
    with frozen(model), plain_model(model):
        for _ in range(settings.refine_epochs):
            summed = 0.0
            for number in torch.randperm(len(batches), generator=generator).tolist():
                batch = batches[number]
                if number not in plain:
                    with torch.no_grad():
                        plain[number] = first_logits(model, batch).to(torch.float16)
                before = plain[number].float()
                kind = harmful[torch.tensor(batch.rows)].to(before.device)
                with torch.enable_grad(), moving(model, products.moves()):
                    after = first_logits(model, batch).log_softmax(dim=-1)
                    loss = _loss(before, after, kind, refusing.to(before.device), shares, settings.refine_stay)
                    optimiser.zero_grad(set_to_none=True)
                    loss.backward()
                if not bool(torch.isfinite(loss)):
                    raise RunError(
                        "Training the energies through the model gave numbers that are not finite: set a lower "
                        "--training-refine-rate, or load the model in float32."
                    )
                optimiser.step()
                schedule.step()
                summed += float(loss)
                done += 1
                if progress is not None:
                    progress(done, total)
            losses.append(summed / len(batches))
    return losses


def _loss(
    before: Tensor, after: Tensor, harmful: Tensor, refusing: Tensor, shares: dict[bool, float], stay: float
) -> Tensor:
    wanted = wanted_logs(before, harmful, refusing)
    change = (wanted.exp() * (wanted - after)).sum(dim=-1)
    logs = before.log_softmax(dim=-1)
    refuses = (logs.exp() * refusing).sum(dim=-1)
    right = torch.where(harmful, refuses, 1 - refuses)
    kept = (logs.exp() * (logs - after)).sum(dim=-1)
    weight = torch.where(harmful, 0.5 / shares[True], 0.5 / shares[False])
    return (weight * (change + stay * right * kept)).mean()
