"""Attaching to a model: forward pre-hooks that move the states of a few tokens, and nothing else.

Which tokens move: the window, that is the prompt's last token and the first `window` generated ones. Tokens are told by
their position counted without pads, so left padding, right padding, none, beams, chunked prefill and assisted generation
are all the same rule: start <= position <= start + window, where start is the position of the prompt's last token. Pads
and earlier prompt tokens are never touched.

Where the prompt ends is known exactly inside `generate` (its inputs end there) and inside `Steering.prompts`. A forward
pass of one's own is read like this: with an empty or unknown cache, or more than one new token, the pass ends a prompt;
one more token on the cache of the pass before is a generated one.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from elsteer.errors import SteeringError
from elsteer.models import decoder_blocks, decoder_of

__all__ = ["Move", "Steering"]

_MARK = "_elsteer_steering"
_PAGED = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


class Move(Protocol):
    """What moves the states of one layer: states (n, d) and strength (a number or (n,)) to what is added, (n, d) float32."""

    def delta(self, states: Tensor, strength: Tensor | float = 1.0) -> Tensor: ...


class Steering:
    """A landscape (or another method) attached to a model: context manager and handle.

    model: any causal language model of transformers, compiled or not. moves: by decoder block. window: how many generated
    tokens after the prompt's last token are steered. strength: a number, or a tensor with one per row of the batch; 0 is
    bit for bit the plain model. Raises SteeringError when the model is steered already or cannot be hooked.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        moves: Mapping[int, Move],
        *,
        window: int,
        strength: Tensor | float = 1.0,
        blocks: str | None = None,
    ) -> None:
        self.model: PreTrainedModel = getattr(model, "_orig_mod", model)  # torch.compile wraps the model
        self._compiled = self.model is not model or self.model._compiled_call_impl is not None
        self._blocks = decoder_blocks(self.model, blocks)
        self._owner = decoder_of(self.model, blocks)
        self.window, self.enabled = window, True
        self.strength = strength
        self._check(moves)
        self._moves = dict(moves)
        for at, move in self._moves.items():
            if isinstance(move, nn.Module):
                move.to(next(self._blocks[at].parameters()).device)
        self._starts: Tensor | None = None  # (B,) position of each row's prompt end
        self._end_column: int | None = None  # the column of the prompt's end, known inside `generate`
        self._given: tuple[Tensor, Tensor | None] | None = None  # lengths and rows told by `prompts`
        self._cache: weakref.ref[Any] | None = None
        self._active: tuple[Tensor, Tensor, Tensor | float] | None = None  # batch index, query index, strength
        self._where: tuple[Tensor, Tensor, Tensor | float] | None = None  # the same in fixed shapes, while compiling
        self._fired = 0
        self._handles: list[Any] = []
        try:
            self._register()
        except BaseException:
            self.remove()
            raise

    # The handle

    @property
    def strength(self) -> Tensor | float:
        """Scales the step; a number, or one per row."""
        return self._strength

    @strength.setter
    def strength(self, value: Tensor | float) -> None:
        values = torch.as_tensor(value, dtype=torch.float32)
        if values.dim() > 1 or not bool(torch.isfinite(values).all()):
            raise SteeringError(
                "strength is one finite number, or a tensor with one finite number per row of the batch."
            )
        self._strength: Tensor | float = values if values.dim() == 1 else float(values)
        self._off = not bool(values.any())

    def disable(self) -> None:
        """Let the plain model run, without detaching."""
        self.enabled = False

    def enable(self) -> None:
        """Steer again after `disable`."""
        self.enabled = True

    def remove(self) -> None:
        """Detach. Calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if getattr(self._owner, _MARK, None) is self:
            delattr(self._owner, _MARK)
            for name in ("generate", *_PAGED):
                self.model.__dict__.pop(name, None)
            if self._compiled:
                torch.compiler.reset()  # compiled code does not look at hooks again by itself

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    @contextmanager
    def prompts(self, lengths: Tensor, rows: Tensor | None = None) -> Iterator[None]:
        """Say where the prompts end, for forward passes of one's own: lengths (B,) in tokens without pads.

        rows: (B,) the places of a strength tensor that belong to the batch's rows, where strength is a tensor.
        """
        self._given = (lengths, rows)
        try:
            yield
        finally:
            self._given = None

    # Hooks

    def _check(self, moves: Mapping[int, Move]) -> None:
        if not moves:
            raise SteeringError("There is no layer to steer: the landscape is empty.")
        if beyond := [at for at in moves if not 0 <= at < len(self._blocks)]:
            raise SteeringError(
                f"The model has {len(self._blocks)} decoder blocks; there is no block {beyond[0]} to steer."
            )
        if getattr(self._owner, _MARK, None) is not None:
            raise SteeringError(
                "This model is steered already: call .remove() on the first handle before attaching again."
            )

    def _register(self) -> None:
        setattr(self._owner, _MARK, self)
        self._handles.append(self._owner.register_forward_pre_hook(self._before, with_kwargs=True))
        self._handles.append(self._owner.register_forward_hook(self._after))
        for at, move in self._moves.items():
            self._handles.append(self._blocks[at].register_forward_pre_hook(self._layer(move), with_kwargs=True))
        if hasattr(self.model, "generate"):
            self.model.__dict__["generate"] = self._generate(self.model.generate)
        for name in _PAGED:
            if hasattr(self.model, name):
                self.model.__dict__[name] = _refuse_paged
        if self._compiled:
            torch.compiler.reset()

    def _generate(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def generate(*args: Any, **kwargs: Any) -> Any:
            if self._off or not self.enabled:
                return plain(*args, **kwargs)
            names = list(inspect.signature(plain).parameters)
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
            ids = next((kwargs[n] for n in ("inputs", "input_ids", "inputs_embeds") if kwargs.get(n) is not None), None)
            mask = kwargs.get("attention_mask")
            if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] > 1:
                kwargs, mask = _left_padded(kwargs, mask)
            outer = self._end_column
            if ids is not None:
                self._end_column = (mask if isinstance(mask, Tensor) and mask.dim() == 2 else ids).shape[1] - 1
            else:
                self._end_column = 0  # generation from the begin token alone
            self._starts = None
            try:
                return plain(**kwargs)
            finally:
                self._end_column, self._starts = outer, None

        return generate

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._active = self._where = None
        self._fired = 0
        if self._off or not self.enabled:
            return
        inputs = next(
            (x for x in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None), None
        )
        if inputs is None:
            raise SteeringError("The model was called without input_ids or inputs_embeds: there is nothing to steer.")
        rows, width = inputs.shape[:2]
        if torch.compiler.is_compiling():
            self._before_compiled(inputs, rows, width, kwargs)
            return
        cache = kwargs.get("past_key_values")
        seen = 0 if cache is None else int(cache.get_seq_length())
        given, end = self._given, self._end_column
        if given is None and end is not None and (seen + width <= end or seen > end + self.window):
            return  # a chunk before the prompt's end, or past the window
        position, real = _positions(kwargs, rows, width, seen, inputs.device)
        if given is not None:
            self._starts = given[0].to(inputs.device) - 1
        elif end is not None:
            if seen <= end < seen + width:
                self._starts = position[:, end - seen]
        elif self._begins(cache, seen, width):
            # the last real token of each row: the highest position among the real ones
            self._starts = position.masked_fill(~real, -1).amax(dim=1)
        if self._starts is None or self._starts.shape[0] != rows:
            raise SteeringError(
                "It cannot be told where the prompts end in this forward pass (the batch changed within a sequence): "
                "use model.generate, or say it with `with steering.prompts(lengths):`."
            )
        start = self._starts[:, None]
        active = real & (position >= start) & (position <= start + self.window)
        batch, query = active.nonzero(as_tuple=True)
        if len(batch):
            strength = self._per_row(rows)
            self._active = (batch, query, strength[batch.cpu()] if isinstance(strength, Tensor) else strength)

    def _begins(self, cache: Any, seen: int, width: int) -> bool:
        same = cache is not None and self._cache is not None and self._cache() is cache
        self._cache = None if cache is None else weakref.ref(cache)
        return seen == 0 or width > 1 or not same or self._starts is None

    def _per_row(self, rows: int) -> Tensor | float:
        if not isinstance(self._strength, Tensor):
            return self._strength
        if self._given is not None and self._given[1] is not None:
            return self._strength[self._given[1].cpu()]
        if rows % len(self._strength):
            raise SteeringError(
                f"strength has {len(self._strength)} entries and the batch {rows} rows: give one number, or one per row."
            )
        return self._strength.repeat_interleave(rows // len(self._strength))  # beams and returned sequences

    def _before_compiled(self, inputs: Tensor, rows: int, width: int, kwargs: dict[str, Any]) -> None:
        # Fixed shapes and no look at values: a pass of several tokens ends a prompt, one of one token goes on.
        position, real = _positions(kwargs, rows, width, None, inputs.device)
        if width > 1 or self._starts is None:
            last = position.masked_fill(~real, -1).argmax(dim=1)
            self._starts = position.gather(1, last[:, None])[:, 0]
            moving = torch.ones_like(last, dtype=torch.bool)
        else:
            last = torch.zeros(rows, dtype=torch.long, device=inputs.device)
            moving = position[:, 0] <= self._starts + self.window
        self._where = (last, moving, self._per_row(rows))

    def _layer(self, move: Move) -> Callable[..., Any]:
        def steer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._active is None and self._where is None:
                return None
            hidden: Tensor = args[0] if args else kwargs["hidden_states"]
            moved = self._moved(move, hidden)
            if args:
                return (moved, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": moved}

        return steer

    @torch.no_grad()
    def _moved(self, move: Move, hidden: Tensor) -> Tensor:
        device = move.shift.device if isinstance(getattr(move, "shift", None), Tensor) else hidden.device
        if self._where is not None:
            last, moving, strength = self._where
            index = last[:, None, None].expand(-1, 1, hidden.shape[-1])
            states = hidden.gather(1, index)[:, 0].float()
            delta = move.delta(states, strength)
            new = torch.where(moving[:, None], (states + delta).to(hidden.dtype), states.to(hidden.dtype))
            return hidden.scatter(1, index, new[:, None])
        assert self._active is not None
        batch, query, strength = self._active
        batch, query = batch.to(hidden.device), query.to(hidden.device)
        states = hidden[batch, query].float()
        delta = move.delta(states.to(device), strength).to(states)
        moved = hidden.clone()
        moved[batch, query] = (states + delta).to(hidden.dtype)
        self._fired += 1
        return moved

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling() or self._active is None:
            return
        self._active = None
        if self._fired != len(self._moves):
            raise SteeringError(
                f"Steering reached {self._fired} of {len(self._moves)} layers in this forward pass, so the output was not "
                "steered as the landscape says: run the model without the engine or wrapper that bypasses its hooks."
            )


def _positions(
    kwargs: dict[str, Any], rows: int, width: int, seen: int | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Positions without pads (B, q) and which of the new tokens are real (B, q)."""
    mask, given = kwargs.get("attention_mask"), kwargs.get("position_ids")
    real = torch.ones(rows, width, dtype=torch.bool, device=device)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        columns = slice(mask.shape[1] - width, None) if seen is None else slice(seen, seen + width)
        if mask.shape[1] >= width + (seen or 0):
            real = mask[:, columns].to(device).bool()
            return (mask.to(device).long().cumsum(dim=1) - 1)[:, columns], real
    if isinstance(given, Tensor) and given.dim() == 2:
        return given.to(device).expand(rows, width), real
    return (torch.arange(width, device=device) + (seen or 0)).expand(rows, width), real


def _left_padded(kwargs: dict[str, Any], mask: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Right-padded inputs of `generate`, turned: it reads the last column, which would be a pad."""
    right = (mask[:, -1] == 0).any()
    if not bool(right):
        return kwargs, mask
    width = mask.shape[1]
    index = (torch.arange(width, device=mask.device) + mask.sum(dim=1, keepdim=True)) % width
    if not bool((mask.gather(1, index).diff(dim=1) >= 0).all()):
        raise SteeringError("The attention mask has pads on both sides or between the tokens: pad on the left.")
    turned = {"attention_mask": mask.gather(1, index)}
    for name in ("inputs", "input_ids"):
        if isinstance(ids := kwargs.get(name), Tensor):
            turned[name] = ids.gather(1, index.to(ids.device))
    if isinstance(embeds := kwargs.get("inputs_embeds"), Tensor):
        turned["inputs_embeds"] = embeds.gather(1, index.to(embeds.device)[:, :, None].expand_as(embeds))
    return {**kwargs, **turned}, turned["attention_mask"]


def _refuse_paged(*args: Any, **kwargs: Any) -> Any:
    raise SteeringError(
        "Continuous batching packs rows in a way that this version cannot steer: use model.generate, or detach first."
    )
