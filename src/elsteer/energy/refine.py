"""Training product energies through the model: what counts is what steering by them does to the answer's first token.

Fitted to states alone (`elsteer.energy.product`), an energy knows which states go with which verdict, but not what moving
them does. Here the frozen model answers. For a training prompt, p is its plain distribution of the first token after the
prompt, and w(t) the share of refusals among plain answers that begin with token t: of those that the model gives, and of those
that it goes on with where it is made to begin with t (`elsteer.openers`; without them a step learns to say "Sorry" for
"I'm sorry"). Wanted is the model's own distribution,
given the right verdict, and sharpened so that tokens that begin both kinds of answer are shunned:

    q(t) ~ p(t) w(t)^4             harmful prompts
    q(t) ~ p(t) (1 - w(t))^4       benign prompts

The loss is KL(q || p steered), plus `refine_stay` times KL(p || p steered) and `refine_still` times the mean over the layers of
(tanh(u) g)^2, both in so far as the model was right before. So a prompt that gets the right verdict already asks for no change,
the words that an answer begins with stay the model's own, and the need g (`elsteer.energy.product`) learns to be small there.
The gradient reaches, through the blocks after them, the direction c (does the model refuse), the reader of the need, the length
of the step, and the offset b of u (is refusing due), of every steered block. No weight of the model is touched.

Whether refusing is due is what a state tells worst: prompts that differ by a word differ little. So u gets `refine_units` hidden
units first, u = a.x + b + r.silu(W x + s), and sees the context of the state (`elsteer.energy.context`): x is then followed by
it. All are trained on stored states and values alone to tell harmful from benign prompts (`SteeredProducts.see`,
`add_units`), queries included, by logistic loss with the two kinds weighing the same; the weight of the benign half then
shifts b by its log.
Steps go by the mean of u over the steered blocks up to their own (`refine_pooled`; `elsteer.energy.product`), and these means
are what is trained then.
Then u is multiplied by `refine_gain`, so that fewer steps are too short to change the verdict, and left alone, its offset
aside: the loss through the model makes it surer of the training prompts and worse on others, of other hands above all
(docs/algorithm.md). `refine_due` trains it on nonetheless.

This is distillation of a conditioned distribution into an intervention on hidden states, as in representation finetuning
(ReFT, Wu et al. 2024, arXiv 2404.03592), with the intervention held to a guarded step down an energy: `elsteer.energy.descent`.

Shapes: L steered layers, B rows of a batch, N prompts, V the vocabulary, d the hidden size, m hidden units of u.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from elsteer.decoding import PromptBatch, first_logits, plain_model
from elsteer.energy.context import attend
from elsteer.energy.product import need, verdict_means, verdict_row
from elsteer.energy.schedule import one_cycle
from elsteer.errors import RunError
from elsteer.models import decoder_blocks
from elsteer.settings import TrainingSettings

__all__ = ["AS_TRAINED", "SteeredProducts", "refine"]

AS_TRAINED = 0.1  # the rule's eta at which a step is as long as it was trained to be
_LENGTH = 0.8  # of every step at the start, in units of AS_TRAINED * scale * sqrt(d)
_TOKENS = 256  # of the plain distribution, the likeliest; the rest counts as one token
_SHARPNESS = 4
_LEAST = 1e-3  # of w and 1 - w
_UNITS_RATE, _UNITS_BATCH = 2e-3, 128
_ALIKE = 16  # prompts whose contexts are made at a time
_DROPPED = 0.2  # share of a context's numbers that are left out while u is trained


class SteeredProducts(nn.Module):
    """The trainable form of the product energies of `layers`: their directions, offsets and lengths.

    tensors: by layer, as `ProductEnergies.tensors_of` gives them. harm: by layer, the direction (d,) that the guard holds
    besides a. sharpness: k of the need, 0 for
    none; it asks for reader, d (L, d) and f (L,) that r starts from (`refusal_reader`). pooled: steps go by the mean of u over
    the blocks up to theirs.
    """

    mean: Tensor
    scale: Tensor
    harm: Tensor
    read_length: Tensor
    context_mean: Tensor
    context_scale: Tensor

    def __init__(
        self,
        tensors: Mapping[int, dict[str, Tensor]],
        harm: Mapping[int, Tensor],
        *,
        reader: tuple[Tensor, Tensor] | None = None,
        sharpness: float = 0.0,
        pooled: bool = False,
    ) -> None:
        super().__init__()
        self.sharpness, self.pooled = sharpness, pooled
        self._values: Sequence[Tensor] | None = None  # by place, (T, C)
        self._blocks = 0, 0
        self.layers = sorted(tensors)
        names = ("weight", "bias", "mean", "scale")
        weight, bias, mean, scale = (torch.stack([tensors[at][name].float() for at in self.layers]) for name in names)
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.register_buffer("harm", torch.stack([harm[at].float() for at in self.layers]))
        self.due = nn.Parameter(weight[:, 0].clone())  # a
        self.offset = nn.Parameter(bias[:, 0].clone())  # b
        self.turn = nn.Parameter(nn.functional.normalize(weight[:, 1], dim=1))  # c
        self.units = nn.Parameter(weight[:, 2:].clone())  # W, (L, m, d)
        self.thresholds = nn.Parameter(bias[:, 2:].clone())  # s, (L, m)
        bends = [tensors[at].get("bend", weight.new_zeros(0)) for at in self.layers]
        self.bend = nn.Parameter(torch.stack(bends).float())  # r, (L, m)
        self.log_length = nn.Parameter(torch.full((len(self.layers),), math.log(_LENGTH)))
        self.unit = AS_TRAINED * math.sqrt(mean.shape[1])
        self.pushes: list[Tensor] = []  # tanh(u) g of the latest pass, (B,) by layer
        if sharpness:
            if reader is None:
                raise ValueError("the need reads whether the model refuses: give the reader that it starts from")
            length_of = reader[0].float().norm(dim=1).clamp_min(1e-12)
            self.register_buffer("read_length", length_of)
            self.read = nn.Parameter(reader[0].float() / length_of[:, None])  # d, over its length at the start
            self.read_offset = nn.Parameter(reader[1].float().clone())  # f

    @classmethod
    def going_on(cls, tensors: Mapping[int, dict[str, Tensor]], harm: Mapping[int, Tensor]) -> SteeredProducts:
        """Energies that were trained through the model before, as `tensors` gave them; harm as for any.

        Where they read contexts, `see_again` gives these.
        """
        layers = sorted(tensors)
        first = tensors[layers[0]]
        sharpness = float(first["sharpness"]) if "sharpness" in first else 0.0
        reader = None
        if sharpness:
            weight, bias = (torch.stack([tensors[at][name][-1] for at in layers]) for name in ("weight", "bias"))
            reader = weight, bias
        inner = {
            layer: {**found, **{name: found[name][: 2 + len(found.get("bend", ()))] for name in ("weight", "bias")}}
            for layer, found in tensors.items()
        }
        found = cls(inner, harm, reader=reader, sharpness=sharpness, pooled="pooled" in first)
        found.log_length.data = torch.stack([tensors[at]["length"].float().log() for at in layers])
        return found

    @torch.no_grad()
    def see_again(self, tensors: Mapping[int, dict[str, Tensor]], values: Sequence[Tensor]) -> None:
        """Let u read contexts as it did where `tensors` come from, of every prompt's values (T, C)."""
        found = [tensors[layer] for layer in self.layers]
        first, stop = (int(one) for one in found[0]["context_blocks"].tolist())
        self._values, self._blocks = values, (first, stop)
        self.register_buffer("context_mean", found[0]["context_mean"].float())
        self.register_buffer("context_scale", torch.ones_like(self.context_mean))
        self.query = nn.Parameter(found[0]["context_query"].float())
        count = self.units.shape[1]
        weights = torch.stack([one["context_weight"].float().flatten(1) for one in found])  # (L, rows, H * C)
        self.due = nn.Parameter(torch.cat([self.due, weights[:, 0]], dim=1))
        self.units = nn.Parameter(torch.cat([self.units, weights[:, 2 : 2 + count]], dim=2))

    @torch.no_grad()
    def see(self, values: Sequence[Tensor], blocks: tuple[int, int], heads: int, *, seed: int = 0) -> None:
        """Let u read contexts by `heads` queries, of every prompt's values (T, C) in the blocks (first, stop).

        The queries begin near 0, where they take the mean.
        """
        generator = torch.Generator().manual_seed(seed)
        some = torch.cat(list(values[:: 1 + len(values) // 4000])).float()
        self._values, self._blocks = values, blocks
        self.register_buffer("context_mean", some.mean(dim=0))
        self.register_buffer("context_scale", some.std(dim=0).clamp_min(1e-6))
        width = some.shape[1]
        self.query = nn.Parameter(0.02 * torch.randn(heads, width, generator=generator))  # of standardised values
        size = heads * width
        self.due = nn.Parameter(torch.cat([self.due, self.due.new_zeros(len(self.layers), size)], dim=1))
        self.units = nn.Parameter(torch.cat([self.units, self.units.new_zeros(*self.units.shape[:2], size)], dim=2))

    def contexts(self, places: Tensor) -> Tensor:
        """(B, H * C): the contexts of prompts by place, standardised. Differentiable by the queries."""
        assert self._values is not None
        device, zeros = self.query.device, torch.zeros_like(self.context_mean)
        lengths = torch.tensor([len(self._values[place]) for place in places.tolist()])
        order = lengths.argsort()
        found = []
        for rows in order.split(_ALIKE):  # of similar length, so that little is padded
            some = [self._values[place] for place in places[rows].tolist()]
            values = nn.utils.rnn.pad_sequence(some, batch_first=True).to(device).float()
            kept = torch.arange(values.shape[1]) < lengths[rows, None]
            values = (values - self.context_mean) / self.context_scale
            found.append(attend(values, kept.to(device), self.query, zeros).flatten(1))
        return torch.cat(found)[order.argsort().to(device)]

    def directions(self) -> Tensor:
        """(L, d) unit vectors along P c: what a step goes along."""
        due = self.due[:, : self.mean.shape[1]]
        guard = torch.linalg.qr(torch.stack([self.harm, due], dim=2)).Q  # (L, d, 2)
        inside = torch.einsum("ld,ldk->lk", self.turn, guard)
        return nn.functional.normalize(self.turn - torch.einsum("lk,ldk->ld", inside, guard), dim=1)

    def add_units(
        self,
        states: Tensor,
        harmful: Tensor,
        units: int,
        *,
        seed: int = 0,
        epochs: int = 20,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Give u `units` hidden units and train it, linear part included, on states (n, L, d) and harmful (n,) bool.

        Logistic loss with the two kinds weighing the same, AdamW, one-cycle rate.
        Where steps go by the mean of u so far, it is this mean that is trained, so that a block learns what those before miss.
        """
        count, size = self.due.shape
        generator = torch.Generator().manual_seed(seed)
        device = self.mean.device
        self.units = nn.Parameter((torch.randn(count, units, size, generator=generator) / math.sqrt(size)).to(device))
        self.thresholds = nn.Parameter(torch.zeros(count, units, device=device))
        self.bend = nn.Parameter((0.1 * torch.randn(count, units, generator=generator) / math.sqrt(units)).to(device))
        matrices, offsets = [self.units, self.due, self.bend], [self.thresholds, self.offset]
        if self._values is not None:
            matrices.append(self.query)
        optimiser = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": offsets, "weight_decay": 0.0}], lr=_UNITS_RATE
        )
        starts = range(0, len(states), _UNITS_BATCH)
        total = max(2, epochs * len(starts))
        schedule = one_cycle(optimiser, _UNITS_RATE, total)
        weights = _kind_weights(harmful, 1.0)
        for epoch in range(epochs):
            order = torch.randperm(len(states), generator=generator)
            for start in starts:
                rows = order[start : start + _UNITS_BATCH]
                with torch.enable_grad():
                    x = (states[rows].to(device).float() - self.mean) / self.scale[:, None]
                    seen = None if self._values is None else self._thinned(self.contexts(rows), generator)
                    u = self._due(x, seen)
                    u = self._mean_so_far(u) if self.pooled else u
                    wanted = harmful[rows].to(u)[:, None].expand_as(u)
                    each = nn.functional.binary_cross_entropy_with_logits(u, wanted, reduction="none")
                    loss = (weights[rows].to(u)[:, None] * each).mean(dim=0).sum()
                    optimiser.zero_grad(set_to_none=True)
                    loss.backward()
                optimiser.step()
                schedule.step()
            if progress is not None:
                progress(epoch + 1, epochs)

    @staticmethod
    def _thinned(contexts: Tensor, generator: torch.Generator) -> Tensor:
        """Contexts without a share of their numbers, left out by chance."""
        kept = torch.rand(contexts.shape, generator=generator).to(contexts.device) >= _DROPPED
        return contexts * kept / (1 - _DROPPED)

    @torch.no_grad()
    def times(self, gain: float) -> None:
        """Multiply u by `gain`: where it is 0 stays, and tanh(u) is nearer to -1 or 1."""
        for part in (self.due, self.offset, self.bend):
            part.mul_(gain)

    @torch.no_grad()
    def weigh(self, ratio: float, gain: float = 1.0) -> None:
        """Shift u as if benign prompts weighed `ratio` times as much: u is log-odds, here times `gain`."""
        self.offset.sub_(gain * math.log(ratio))

    @staticmethod
    def _mean_so_far(u: Tensor) -> Tensor:
        """Of u (n, L), for each layer the mean over the layers up to it."""
        return u.cumsum(dim=1) / torch.arange(1, u.shape[1] + 1, device=u.device)

    def _due(self, x: Tensor, contexts: Tensor | None = None) -> Tensor:
        """u (n, L) of standardised states x (n, L, d) and, where u reads them, contexts (n, H * C)."""
        size = self.mean.shape[1]
        inside = torch.baddbmm(self.thresholds[:, None], x.transpose(0, 1), self.units[:, :, :size].transpose(1, 2))
        straight = torch.einsum("nld,ld->nl", x, self.due[:, :size]) + self.offset
        if contexts is not None:
            inside = inside + torch.einsum("nc,lmc->lnm", contexts, self.units[:, :, size:])
            straight = straight + contexts @ self.due[:, size:].T
        return straight + torch.einsum("lnm,lm->nl", nn.functional.silu(inside), self.bend)

    def moves(self, places: Tensor | None = None) -> dict[int, Callable[[Tensor], Tensor]]:
        """By layer, states (B, d) to what is added to them, differentiable; on the states' device.

        places: (B,) of the states' prompts, where u reads their contexts (of zeros by default).
        """
        contexts = None if self._values is None or places is None else self.contexts(places).detach()
        steps = (self.log_length.exp() * self.scale * self.unit)[:, None] * self.directions()
        self.pushes = []
        dues: list[Tensor] = []  # of the blocks so far

        def one(at: int) -> Callable[[Tensor], Tensor]:
            parts = self.mean[at], self.scale[at], self.due[at], self.offset[at], steps[at]
            more = self.units[at], self.thresholds[at], self.bend[at]

            def move(states: Tensor) -> Tensor:
                mean, scale, due, offset, step = (part.to(states.device) for part in parts)
                units, thresholds, bend = (part.to(states.device) for part in more)
                x = (states.float() - mean) / scale
                seen = x if contexts is None else torch.cat([x, contexts.to(x)], dim=1)
                due, units = due[: seen.shape[1]], units[:, : seen.shape[1]]
                u = seen @ due + offset + nn.functional.silu(seen @ units.T + thresholds) @ bend
                dues.append(u)
                if self.pooled:
                    u = torch.stack([due.to(u) for due in dues]).mean(dim=0)
                push = torch.tanh(u)
                if self.sharpness:
                    refuses = (x @ self.read[at].to(x)) * self.read_length[at].to(x) + self.read_offset[at].to(x)
                    push = push * need(push, refuses, x.new_tensor(self.sharpness))
                self.pushes.append(push)
                return (push[:, None] * step).to(states.dtype)

            return move

        return {layer: one(at) for at, layer in enumerate(self.layers)}

    @torch.no_grad()
    def tensors(
        self, states: Tensor, harmful: Tensor, refused: Tensor, rows: Tensor | None = None
    ) -> dict[int, dict[str, Tensor]]:
        """By layer, the tensors of the product energy, its v read off states (n, L, d); harmful, refused, rows: (n,) bool.

        rows: those that count (all by default).
        """
        found, along = {}, self.directions()
        for at, layer in enumerate(self.layers):
            sides = verdict_means(states[:, at], harmful, refused, rows)
            sides = (sides - self.mean[at].double()) / self.scale[at].double()
            c, e = verdict_row(sides, along[at].double())
            weight = torch.cat([self.due[at][None], torch.zeros_like(self.due[at])[None], self.units[at]])
            weight, more = weight[:, : states.shape[2]].clone(), weight[:, states.shape[2] :]
            weight[1] = c.float()
            bias = torch.cat([self.offset[at][None], e.float()[None], self.thresholds[at]])
            if self.sharpness:
                weight = torch.cat([weight, self.read_length[at] * self.read[at][None]])
                bias = torch.cat([bias, self.read_offset[at][None]])
                more = torch.cat([more, torch.zeros_like(more[:1])])
            found[layer] = {
                "weight": weight,
                "bias": bias,
                "mean": self.mean[at].clone(),
                "scale": self.scale[at].clone(),
                "length": self.log_length[at].exp(),
            }
            if self.bend.shape[1]:
                found[layer]["bend"] = self.bend[at].clone()
            if self.pooled:
                found[layer]["pooled"] = torch.tensor(1.0)
            if self.sharpness:
                found[layer]["sharpness"] = torch.tensor(float(self.sharpness))
            if self._values is not None:
                found[layer] |= {
                    "context_weight": more.reshape(len(more), *self.query.shape) / self.context_scale,
                    "context_query": self.query / self.context_scale,
                    "context_mean": self.context_mean.clone(),
                    "context_blocks": torch.tensor([float(each) for each in self._blocks]),
                }
        return found


@dataclass(frozen=True, slots=True)
class _Plain:
    """The plain first token: refusing and the likeliest tokens (B, k); their log shares, last that of all others."""

    tokens: Tensor
    logs: Tensor  # (B, k + 1)

    @classmethod
    def of(cls, logits: Tensor, refusing: Tensor) -> _Plain:
        logs = logits.log_softmax(dim=-1)
        tokens = (logs + 1e4 * (refusing > 0)).topk(min(_TOKENS, logits.shape[-1] - 1), dim=-1).indices
        return cls(tokens, _with_rest(logs.gather(1, tokens)))

    def seen_by(self, logits: Tensor) -> Tensor:
        """Log shares of the same tokens (B, k + 1) in other logits (B, V)."""
        return _with_rest(logits.log_softmax(dim=-1).gather(1, self.tokens))


def _with_rest(logs: Tensor) -> Tensor:
    rest = (1 - logs.exp().sum(dim=-1, keepdim=True)).clamp_min(1e-6).log()
    return torch.cat([logs, rest], dim=-1)


def refine(
    model: PreTrainedModel,
    batches: Sequence[PromptBatch],
    harmful: Tensor,
    labels: Sequence[str | None],
    products: SteeredProducts,
    settings: TrainingSettings,
    *,
    benign_weight: float = 1.0,
    openers: Mapping[int, tuple[int, int]] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Train `products` in place, with AdamW and a one-cycle learning rate; the mean loss of each epoch.

    batches: the prompts, prefilled (`PromptBatch.rows` are their places). By place: harmful (N,) bool, and labels, the judge's
    word on the whole plain answer or None, of which w is made. benign_weight: weight of the benign prompts, all together,
    over that of the harmful ones. openers: by token, refusals and answers more that w is made of (`elsteer.openers`).
    Raises RunError where the loss is not finite.
    """
    products.to(model.device)
    rate, epochs = settings.refine_rate, settings.refine_epochs
    of_due = [products.due, products.units, products.thresholds, products.bend]
    for parameter in of_due:
        parameter.requires_grad_(settings.refine_due)
    slow, fast = [products.turn, *(of_due if settings.refine_due else [])], [products.offset, products.log_length]
    if products.sharpness:
        slow, fast = [*slow, products.read], [*fast, products.read_offset]
    optimiser = torch.optim.AdamW([{"params": slow, "lr": rate}, {"params": fast, "lr": 10 * rate}], weight_decay=0.0)
    total = len(batches) * epochs
    schedule = one_cycle(optimiser, [rate, 10 * rate], max(2, total))
    of_batch = _places(batches)
    rows = torch.tensor([row for places in of_batch for row in places])
    weights = _kind_weights(harmful, benign_weight, rows)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []

    def told(done: int) -> None:
        if progress is not None:
            progress(done, total)

    with _frozen(model), plain_model(model):
        refusing = _refusing(model, batches, labels, openers or {})
        plain: dict[int, _Plain] = {}
        for epoch in range(epochs):
            summed = 0.0
            for step, number in enumerate(torch.randperm(len(batches), generator=generator).tolist()):
                batch, places = batches[number], torch.tensor(of_batch[number])
                if number not in plain:
                    with torch.no_grad():
                        plain[number] = _Plain.of(first_logits(model, batch), refusing)
                with torch.enable_grad(), _moving(model, products.moves(places)):
                    after = plain[number].seen_by(first_logits(model, batch))
                    kinds = harmful[places].to(after.device)
                    each, right = _losses(plain[number], after, kinds, refusing, settings.refine_stay)
                    moved = torch.stack([push.to(each) for push in products.pushes]).square().mean(dim=0)
                    each = each + settings.refine_still * right * moved
                    loss = (weights[places].to(each.device) * each).mean()
                    optimiser.zero_grad(set_to_none=True)
                    loss.backward()
                if not bool(torch.isfinite(loss)):
                    raise RunError(
                        "Training the energies through the model gave numbers that are not finite: set a lower "
                        "--training-refine-rate, or load the model in float32."
                    )
                optimiser.step()
                schedule.step()
                summed += float(loss.detach())
                told(len(batches) * epoch + step + 1)
            losses.append(summed / len(batches))
    return losses


def _kind_weights(harmful: Tensor, benign_weight: float, rows: Tensor | None = None) -> Tensor:
    """(N,): weights of mean 1 over `rows` (all by default), the benign ones' sum `benign_weight` times the harmful ones'."""
    share = (harmful if rows is None else harmful[rows]).float().mean().clamp(1e-6, 1 - 1e-6)
    return torch.where(harmful, 1 / share, benign_weight / (1 - share)) / (1 + benign_weight)


def _places(batches: Sequence[PromptBatch]) -> list[Sequence[int]]:
    """The places of each batch's prompts; a batch that would be prefilled anew is not asked for."""
    keys: list[Sequence[int]] | None = getattr(batches, "keys", None)
    return keys if keys is not None else [batch.rows for batch in batches]


def _refusing(
    model: PreTrainedModel,
    batches: Sequence[PromptBatch],
    labels: Sequence[str | None],
    openers: Mapping[int, tuple[int, int]],
) -> Tensor:
    """w, (V,): of the judged answers that begin with a token, the share of refusals; one answer more counts against it."""
    counts: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    found = torch.zeros(0)
    for at, places in enumerate(_places(batches)):
        if not any(labels[place] for place in places):
            continue
        batch = batches[at]
        with torch.no_grad():
            logits = first_logits(model, batch)
        found = logits.new_zeros(logits.shape[-1])
        for place, token in zip(batch.rows, logits.argmax(dim=-1).tolist(), strict=True):
            if labels[place] in ("refusal", "compliance"):
                counts[token][0] += labels[place] == "refusal"
                counts[token][1] += 1
    if not any(refused for refused, _ in counts.values()):
        raise RunError("There is nothing to learn: of the prompts that were answered in full, none was refused.")
    for token, (refused, seen) in openers.items():
        counts[token][0] += refused
        counts[token][1] += seen
    for token, (refused, seen) in counts.items():
        found[token] = refused / (seen + 1)
    return found


def _losses(plain: _Plain, after: Tensor, harmful: Tensor, refusing: Tensor, stay: float) -> tuple[Tensor, Tensor]:
    """(B,) losses of the module's text, without the last, and how far the model was right before, (B,)."""
    w = torch.cat([refusing[plain.tokens], refusing.new_zeros(len(after), 1)], dim=1)
    share = torch.where(harmful[:, None], w, 1 - w).clamp_min(_LEAST)
    wanted = (plain.logs + _SHARPNESS * share.log()).log_softmax(dim=-1)
    change = (wanted.exp() * (wanted - after)).sum(dim=-1)
    refuses = (plain.logs.exp() * w).sum(dim=-1)
    right = torch.where(harmful, refuses, 1 - refuses)
    return change + stay * right * (plain.logs.exp() * (plain.logs - after)).sum(dim=-1), right


@contextmanager
def _moving(model: PreTrainedModel, moves: Mapping[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """While open, the only token of every pass is moved in the blocks of `moves`, within autograd."""
    blocks = decoder_blocks(model)

    def hook(move: Callable[[Tensor], Tensor]) -> Callable[..., object]:
        def steer(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> object:
            hidden = args[0] if args else kwargs["hidden_states"]
            moved = hidden + move(hidden[:, -1])[:, None]
            return ((moved, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": moved})

        return steer

    handles = [blocks[layer].register_forward_pre_hook(hook(move), with_kwargs=True) for layer, move in moves.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """While open, no weight of `model` asks for a gradient."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
