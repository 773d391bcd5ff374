"""Attaching to a model: forward pre-hooks that move the states of a few tokens, and nothing else.

Which tokens move: the window, that is the prompt's last token and the first `window` generated ones. Pads and earlier
prompt tokens are never touched. Where the prompt ends is known exactly in two cases:

- Inside `generate`: its inputs end there, in every row, so the rule is one of columns: end <= column <= end + window. That
  holds for beams, returned sequences, chunked prefill, no cache, static caches and assisted generation alike.
- Inside `Steering.prompts`: the rule is one of positions counted without pads, so any padding will do.

A forward pass of one's own is read like this: with an empty cache, or more than one new token, the pass ends a prompt; one more
token on the cache of the pass before is a generated one. One more token on another cache could be either, and is an error.

Threads: calls of `generate` wait for each other, as the handle knows of one batch at a time; passes of one's own that overlap
with another thread's are an error.
"""

from __future__ import annotations

import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NoReturn, Protocol, Self

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from elsteer.decoding import STEERED, refuse_steered
from elsteer.energy.context import prompt_context
from elsteer.errors import SteeringError
from elsteer.models import cache_given, cache_made, decoder_blocks, decoder_of
from elsteer.steering.inputs import (
    as_strength,
    generation_is_plain,
    inferred_mask,
    left_padded,
    positions,
    refuse_options,
)

__all__ = ["Move", "Steering"]

_PAGED = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


class Move(Protocol):
    """What moves the states of one layer: states (n, d) and strength (a number or (n,)) to what is added, (n, d) float32.

    One with an attribute `context_blocks` that is not None is given the states' contexts (n, H, C) as a third argument
    (`elsteer.energy.context`), by its `context_query` and `context_mean`, which needs the key-value cache.
    One with a true attribute `pooled` has a method
    `due(states, context)` to (n,), and is given its mean over the steered blocks up to its own as `due`
    (`elsteer.energy.product`).
    """

    def delta(self, states: Tensor, strength: Tensor | float = 1.0) -> Tensor: ...


class Steering:
    """A landscape (or another method) attached to a model: context manager and handle.

    model: any causal language model of transformers, compiled or not. moves: by decoder block. window: how many generated
    tokens after the prompt's last token are steered. strength: a number, or a tensor with one per row of the batch; 0 is
    bit for bit the plain model. Raises SteeringError when the model is steered already or cannot be hooked.

    Attaching and removing drop compiled code (torch.compiler.reset), as it would not see the hooks come and go: the next
    call compiles again. Refused by `generate` while attached: continuous batching, drafts by early exit or by the model's
    own extra heads, classifier-free guidance, token healing.
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
        self._blocks = decoder_blocks(self.model, blocks)
        self._owner = decoder_of(self.model, blocks)
        self.window, self.enabled = window, True
        self.strength = strength
        self._check(moves)
        self._moves = dict(moves)
        for at, move in self._moves.items():
            device = next(self._blocks[at].parameters()).device
            if isinstance(move, nn.Module) and device.type != "meta":  # meta: weights that are offloaded for now
                move.to(device)
        self._starts: Tensor | None = None  # (B,) position of each row's prompt end
        self._end: int | None = None  # the column of the prompt's end, known inside `generate`
        self._asked: int | None = (
            None  # rows of the inputs, known inside `generate`: beams and returned sequences are more
        )
        self._end_tensor: Tensor | None = None  # the same for compiled code, which would be made anew for each number
        self._real: Tensor | None = (
            None  # (rows of the inputs, prompt columns but the last) where `generate` knows them
        )
        self._mask: Tensor | None = (
            None  # (B, columns), in a pass of a model that hands its decoder masks of another form
        )
        self._columns: Tensor | None = None  # (B, C) cache columns of the prompts' tokens before their last one
        self._reads = any(_context_blocks(move) is not None for move in self._moves.values())
        self._leads = _leads(self._moves)
        self._contexts: dict[int, Tensor] = {}  # read in this pass, by the block whose move reads the same first
        self._dues: tuple[Tensor, int] | None = None  # in this pass, the sum of `due` and over how many blocks
        self._past = False  # known inside `generate`: each pass of one token from here on is past the window
        self._given: tuple[Tensor, Tensor | None] | None = None  # lengths and rows told by `prompts`
        self._reached: Tensor | None = None  # (B,) the highest position of each row so far, inside `prompts`
        self._lock = threading.RLock()  # held by the thread that generates
        self._generates: int | None = None  # that thread
        self._passes: int | None = None  # the thread whose pass began last
        self._cache: weakref.ref[Any] | None = None
        self._active: tuple[Tensor, Tensor, Tensor | float] | None = None  # batch index, query index, strength
        self._where: tuple[Tensor, Tensor, Tensor | float] | None = None  # the same in fixed shapes, while compiling
        self._fired, self._ran = 0, False
        self._handles: list[Any] = []
        self._replaced: dict[str, Any] = {}  # what the model's own dictionary held before
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
        self._strength: Tensor | float = as_strength(value)
        self._off = not bool(torch.as_tensor(self._strength).any())

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
        if getattr(self._owner, STEERED, None) is self:
            delattr(self._owner, STEERED)
            for name, before in self._replaced.items():
                self.model.__dict__.pop(name, None)
                if before is not None:
                    self.model.__dict__[name] = before
            _forget_compiled()

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
        Raises SteeringError for lengths that are no whole numbers from 1 up, that are not one per row, or that no pass reached.
        """
        told = torch.as_tensor(lengths)
        if told.dim() != 1 or told.is_floating_point() or told.dtype == torch.bool or bool((told < 1).any()):
            raise SteeringError(
                "lengths are the prompts' numbers of tokens without pads: give one whole number from 1 up per row."
            )
        self._given, self._reached = (told, rows), None
        try:
            yield
            reached = self._reached
        finally:
            self._given = self._reached = None
        if reached is not None and bool((short := reached + 1 < told.to(reached.device)).any()):
            row = int(short.nonzero()[0])
            raise SteeringError(
                f"Row {row} was said to have a prompt of {int(told[row])} tokens and only {int(reached[row]) + 1} ran, so that "
                "it was not steered: give lengths in tokens, without pads."
            )

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise SteeringError("A steered model cannot be copied, as the copy would run this one: detach first.")

    def __reduce__(self) -> NoReturn:
        raise SteeringError("A steered model cannot be pickled: detach first.")

    # Hooks

    def _check(self, moves: Mapping[int, Move]) -> None:
        if not moves:
            raise SteeringError("There is no layer to steer: the landscape is empty.")
        if beyond := [at for at in moves if not 0 <= at < len(self._blocks)]:
            raise SteeringError(
                f"The model has {len(self._blocks)} decoder blocks; there is no block {beyond[0]} to steer."
            )
        refuse_steered(self._owner)

    def _register(self) -> None:
        setattr(self._owner, STEERED, self)
        self._handles.append(self._owner.register_forward_pre_hook(self._before, with_kwargs=True))
        self._handles.append(self._owner.register_forward_hook(self._after))
        for module in self.model.modules():  # around the decoder, such as one with a vision tower beside it
            if module is not self.model and any(part is self._owner for part in module.children()):
                self._handles.append(module.register_forward_pre_hook(self._wrapped, with_kwargs=True))
        for at, move in self._moves.items():
            self._handles.append(self._blocks[at].register_forward_pre_hook(self._layer(at, move), with_kwargs=True))
        if hasattr(self.model, "generate"):
            self._replace("generate", self._generate(self.model.generate))
        for name in _PAGED:
            if hasattr(self.model, name):
                self._replace(name, _refuse_paged)
        _forget_compiled()

    def _replace(self, name: str, new: Callable[..., Any]) -> None:
        self._replaced[name] = self.model.__dict__.get(name)
        self.model.__dict__[name] = new

    def _generate(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        found = inspect.signature(plain).parameters.values()
        if any(one.kind is one.VAR_POSITIONAL for one in found):  # a wrapper, such as an adapter's, that hands all on
            found = inspect.signature(GenerationMixin.generate).parameters.values()
        names = [one.name for one in found if one.name != "self"]

        def generate(*args: Any, **kwargs: Any) -> Any:
            if self._off or not self.enabled:
                return plain(*args, **kwargs)
            with self._lock:
                before, self._generates = self._generates, threading.get_ident()
                try:
                    return steered({**dict(zip(names, args, strict=False)), **kwargs})
                finally:
                    self._generates = before

        def steered(kwargs: dict[str, Any]) -> Any:
            refuse_options(self.model, kwargs)
            ids = next((kwargs[n] for n in ("inputs_embeds", "inputs", "input_ids") if kwargs.get(n) is not None), None)
            mask = kwargs.get("attention_mask")
            if mask is None and ids is not None:
                mask = inferred_mask(self.model, ids, kwargs)
            if isinstance(mask, Tensor) and mask.dim() == 2:
                kwargs, mask = left_padded(kwargs, mask)
            ended = mask if _two_dimensional(mask) else ids
            end = 0 if ended is None else ended.shape[1] - 1  # 0: generation from the begin token alone
            cache = cache_given(kwargs)
            held = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
            if held > end:
                raise SteeringError(
                    f"The cache that is given holds {held} tokens and the prompt has {end + 1}, so that its last token would "
                    "not be run and steered: crop the cache, or give a new one."
                )
            outer = self._end, self._end_tensor, self._real, self._asked
            if generation_is_plain(self.model, kwargs):
                counted = (*(kwargs.get("logits_processor") or ()), _Steps(self))
                kwargs["logits_processor"] = LogitsProcessorList(counted)
            self._real = mask[:, :-1].bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
            self._end = end
            self._end_tensor = torch.tensor(self._end, device=self.model.device)
            self._asked = 1 if ids is None else int(ids.shape[0])
            self._ran, self._past = False, False
            ends = torch.full((self._asked,), self._end, device=self.model.device)
            if isinstance(mask, Tensor) and mask.dim() == 2:
                ends = mask.long().sum(dim=1).to(ends.device) - 1
            try:
                made = plain(**kwargs)
            except BaseException:
                self._cache = None  # where the prompts of what is left in it ended is not known any more
                raise
            finally:
                self._end, self._end_tensor, self._real, self._asked = outer
                self._past = False
                self._active = self._where = self._starts = self._columns = None
            if not self._ran:
                raise SteeringError(_BYPASSED)
            count = len(getattr(made, "sequences", made))
            self._starts = ends.repeat_interleave(max(1, count // len(ends)))  # for one more token on the cache
            return made

        return generate

    def _wrapped(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self._mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _begin_pass(self) -> None:
        if _recording():
            self._passes = _COMPILED
            return
        here = threading.get_ident()
        if self._generates not in (None, here):
            raise SteeringError(_THREADS)
        self._passes = here  # a pass of another thread that is under way notices

    def _same_pass(self) -> None:
        """Raises SteeringError where a pass of another thread has begun since, unless nothing is steered."""
        if _recording() or self._off or not self.enabled:
            return
        if self._passes not in (None, _COMPILED, threading.get_ident()):
            raise SteeringError(_THREADS)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._off and self.enabled:
            self._begin_pass()
        self._active = self._where = self._columns = self._dues = None
        self._contexts.clear()
        self._fired, self._ran = 0, True
        inputs = next(
            (x for x in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None), None
        )
        if self._off or not self.enabled:
            if not _recording() and (inputs is None or inputs.shape[1] > 1 or not self._goes_on(cache_given(kwargs))):
                self._starts = None  # another prompt is begun: its end is not that of the one before
            return
        if inputs is None:
            raise SteeringError("The model was called without input_ids or inputs_embeds: there is nothing to steer.")
        rows, width = inputs.shape[:2]
        mask, self._mask = self._mask, None
        if mask is not None and not _two_dimensional(kwargs.get("attention_mask")):
            kwargs = {**kwargs, "attention_mask": mask}
        if self._past and width == 1:  # without a cache each pass runs the prompt again
            return
        cache = cache_given(kwargs)
        if _recording():
            self._before_compiled(inputs, rows, width, cache, kwargs)
            return
        seen = 0 if cache is None else int(cache.get_seq_length())
        mask = kwargs.get("attention_mask")
        if cache is None and isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] > width:
            raise SteeringError(
                f"The attention mask has {mask.shape[1]} columns and the pass {width} tokens, yet no cache was found among the "
                "model's inputs: this version of transformers passes it in a way that elsteer does not know; install "
                "another one."
            )
        if self._given is None and self._end is not None:
            first, last = max(0, self._end - seen), min(width - 1, self._end + self.window - seen)
            if first > last:
                return  # a chunk before the prompt's end, or past the window
            batch, query = torch.cartesian_prod(torch.arange(rows), torch.arange(first, last + 1)).T.to(inputs.device)
            if self._reads:
                self._columns = self._prompt_columns(rows, seen + width, inputs.device)
        else:
            told = _two_dimensional(mask) or _two_dimensional(kwargs.get("position_ids"))
            if rows > 1 and mask is not None and not told:
                raise SteeringError(
                    "Where the rows' pads are cannot be told from an attention mask of this form: give one of two dimensions, "
                    "(rows, columns), or one row at a time."
                )
            position, real = positions(kwargs, rows, width, seen, inputs.device)
            start = self._start(position, real, cache, seen)[:, None]
            active = real & (position >= start) & (position <= start + self.window)
            batch, query = active.nonzero(as_tuple=True)
            if self._reads:
                self._columns = _columns_before(mask, start, rows, seen + width, inputs.device)
        if len(batch):
            strength = self._per_row(rows)
            self._active = (batch, query, strength[batch.cpu()] if isinstance(strength, Tensor) else strength)

    def _prompt_columns(self, rows: int, count: int, device: torch.device) -> Tensor:
        """(rows, count) bool, inside `generate`: the columns before the prompt's end that are no pads."""
        assert self._end is not None
        found = torch.ones(rows, self._end, dtype=torch.bool, device=device)
        if self._real is not None:  # beams and returned sequences follow their row
            found = self._real.to(device).repeat_interleave(max(1, rows // len(self._real)), dim=0)
        return nn.functional.pad(found, (0, count - self._end))

    def _start(self, position: Tensor, real: Tensor, cache: Any, seen: int) -> Tensor:
        """(B,) position of each row's prompt end."""
        if self._given is not None:
            self._starts = self._given[0].to(position.device) - 1
            if len(self._starts) != len(position):
                raise SteeringError(
                    f"{len(self._starts)} lengths were given for a batch of {len(position)} rows: give one per row."
                )
            highest = position.masked_fill(~real, -1).amax(dim=1)
            self._reached = highest if self._reached is None else torch.maximum(self._reached, highest)
            return self._starts
        if self._begins(cache, seen, position.shape[1]):
            if seen and position.shape[1] == 1 and not self._goes_on(cache):
                raise SteeringError(
                    "It cannot be told whether this token ends a prompt or goes on with an answer, as its cache is not that of "
                    "the pass before: use model.generate, or say where prompts end with `with steering.prompts(lengths):`."
                )
            self._starts = _last_real(position, real, self._starts)
        if self._starts is None or self._starts.shape[0] != position.shape[0]:
            raise SteeringError(
                "It cannot be told where the prompts end in this forward pass (the batch changed within a sequence): "
                "use model.generate, or say it with `with steering.prompts(lengths):`."
            )
        return self._starts

    def _begins(self, cache: Any, seen: int, width: int) -> bool:
        return seen == 0 or width > 1 or not self._goes_on(cache) or self._starts is None

    def _goes_on(self, cache: Any) -> bool:
        """Whether the pass goes on with the cache of the one before."""
        return cache is not None and self._cache is not None and self._cache() is cache

    def _per_row(self, rows: int) -> Tensor | float:
        if not isinstance(self._strength, Tensor):
            return self._strength
        if self._given is not None and self._given[1] is not None:
            if int(self._given[1].max()) >= len(self._strength):
                raise SteeringError(
                    f"strength has {len(self._strength)} entries and row {int(self._given[1].max())} of the prompts is to "
                    "be steered: give one number, or one per prompt."
                )
            return self._strength[self._given[1].cpu()]
        asked = self._asked or rows
        if asked != len(self._strength):
            raise SteeringError(
                f"strength has {len(self._strength)} entries and the batch {asked} rows: give one number, or one per row."
            )
        return self._strength.repeat_interleave(rows // asked)  # beams and returned sequences

    def _before_compiled(self, inputs: Tensor, rows: int, width: int, cache: Any, kwargs: dict[str, Any]) -> None:
        # Fixed shapes and no look at values: so many tokens of each row as the window holds, some of them masked out.
        if self._given is None and self._end_tensor is not None:
            seen = 0 if cache is None else cache.get_seq_length()
            column = (torch.arange(width, device=inputs.device) + seen).expand(rows, width)
            end = self._end_tensor.to(inputs.device)
            active = (column >= end) & (column <= end + self.window)
            if self._reads:
                assert self._end is not None
                self._columns = self._prompt_columns(rows, self._end, inputs.device)
        else:
            goes_on = self._given is None and width == 1 and self._starts is not None  # several tokens end a prompt
            if goes_on and self.window == 0:
                return
            position, real = positions(kwargs, rows, width, None, inputs.device)
            if self._given is not None:
                self._starts = self._given[0].to(inputs.device) - 1
            elif not goes_on:
                self._starts = _last_real(position, real, self._starts)
            assert self._starts is not None
            start = self._starts[:, None]
            active = real & (position >= start) & (position <= start + self.window)
            if self._reads:
                mask = kwargs.get("attention_mask")
                seen = 0 if cache is None else int(cache.get_seq_length())
                self._columns = _columns_before(mask, start, rows, seen + width, inputs.device)
        count = min(self.window + 1, width)
        first = active.to(torch.uint8).argmax(dim=1, keepdim=True).clamp_max(width - count)
        index = first + torch.arange(count, device=inputs.device)
        self._where = (index, active.gather(1, index), self._per_row(rows))

    def _layer(self, at: int, move: Move) -> Callable[..., Any]:
        buffer = next(move.buffers(), None) if isinstance(move, nn.Module) else None
        device = None if buffer is None else buffer.device

        def steer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._same_pass()
            if self._active is None and self._where is None:
                return None
            hidden: Tensor = args[0] if args else kwargs["hidden_states"]
            with torch.autocast(hidden.device.type, enabled=False):  # the step is float32
                context = self._context(at, move, args, kwargs) if self._reads else None
                moved = self._moved(move, hidden, context, device or hidden.device)
            if args:
                return (moved, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": moved}

        return steer

    def _context(self, at: int, move: Move, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """(B, H, C) contexts of the rows, where the move at block `at` reads them; in each pass they are made once."""
        if (blocks := _context_blocks(move)) is None:
            return None
        if (made := self._contexts.get(self._leads[at])) is not None:
            return made
        cache = next((arg for arg in (*kwargs.values(), *args) if hasattr(arg, "get_seq_length")), None)
        assert self._columns is not None
        query, mean = move.context_query, move.context_mean  # type: ignore[attr-defined]
        found = self._contexts[self._leads[at]] = prompt_context(cache, blocks, self._columns, query, mean)
        return found

    def _moved(self, move: Move, hidden: Tensor, context: Tensor | None, device: torch.device) -> Tensor:
        if self._where is not None:
            return self._moved_compiled(move, hidden, context, *self._where)
        assert self._active is not None
        batch, query, strength = self._active
        batch, query = batch.to(hidden.device), query.to(hidden.device)
        states = hidden[batch, query].float()
        if context is not None:
            context = context.to(batch.device)[batch].to(device)
        delta = self._delta(move, states.to(device), strength, context).to(states)
        moved = hidden.clone()
        moved[batch, query] = (states + delta).to(hidden.dtype)
        self._fired += 1
        return moved

    def _delta(self, move: Move, states: Tensor, strength: Tensor | float, context: Tensor | None) -> Tensor:
        more: dict[str, Tensor] = {} if context is None else {"context": context}
        if getattr(move, "pooled", False):
            total, count = move.due(states, context), 1  # type: ignore[attr-defined]
            if self._dues is not None:
                total, count = total + self._dues[0].to(total.device), self._dues[1] + 1
            self._dues = total, count
            more["due"] = total / count
        return move.delta(states, strength, **more)

    def _moved_compiled(
        self,
        move: Move,
        hidden: Tensor,
        context: Tensor | None,
        index: Tensor,
        active: Tensor,
        strength: Tensor | float,
    ) -> Tensor:
        """hidden (B, q, d) with its tokens at index (B, n) moved where active (B, n)."""
        if isinstance(strength, Tensor):
            strength = strength.to(hidden.device).repeat_interleave(index.shape[1])
        every = index.shape[1] == hidden.shape[1]
        where = index[:, :, None].expand(-1, -1, hidden.shape[-1])
        states = hidden if every else hidden.gather(1, where)
        if context is not None:
            context = context.to(hidden.device).repeat_interleave(index.shape[1], dim=0)
        exact = states.float()
        delta = self._delta(move, exact.flatten(0, 1), strength, context).view_as(states)
        moved = torch.where(active[:, :, None], (exact + delta).to(hidden.dtype), states)
        return moved if every else hidden.scatter(1, where, moved)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if _recording():
            return
        self._same_pass()
        self._contexts.clear()  # what they keep for a backward pass goes with the output
        self._dues = None
        cache = cache_made(output)
        self._cache = None if cache is None else weakref.ref(cache)
        if self._active is None:
            return
        self._active = None
        if self._fired != len(self._moves):
            raise SteeringError(
                f"Steering reached {self._fired} of {len(self._moves)} layers in this forward pass, so the output was not "
                "steered as the landscape says: run the model without the engine or wrapper that bypasses its hooks."
            )


_COMPILED = -1  # in place of a thread: compiled code does not ask for it
_THREADS = (
    "Two threads ran this steered model at once, which it cannot tell apart: use model.generate, whose calls wait for each "
    "other, or a lock around forward passes of your own."
)
_BYPASSED = (
    "The model generated without calling its decoder through its hooks, so nothing was steered: run it without the engine "
    "or wrapper that bypasses them."
)


class _Steps(LogitsProcessor):
    """Called by `generate` once a step: tells when the window is past, so that a token's pass is not looked at."""

    def __init__(self, steering: Steering) -> None:
        self.steering, self.steps = steering, 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.steps += 1  # the pass that follows runs the generated token of this number
        self.steering._past = self.steps > self.steering.window
        return scores


def _recording() -> bool:
    """Whether the pass is compiled or captured into a CUDA graph: fixed shapes then, and no look at values."""
    return torch.compiler.is_compiling() or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def _last_real(position: Tensor, real: Tensor, buffer: Tensor | None) -> Tensor:
    """(B,) position of the last real token of each row of position and real (B, q): the highest among the real ones.

    Written into `buffer` where that fits: a captured CUDA graph reads it where it was.
    """
    found = position.masked_fill(~real, -1).amax(dim=1)
    if buffer is None or buffer.shape != found.shape or buffer.device != found.device or buffer.is_inference():
        return found
    return buffer.copy_(found)


def _context_blocks(move: Move) -> tuple[int, int] | None:
    return getattr(move, "context_blocks", None)


def _leads(moves: Mapping[int, Move]) -> dict[int, int]:
    """By block, the first block whose move reads the same context; of blocks whose moves read one."""

    def reading(at: int) -> tuple[Tensor, Tensor]:
        move = moves[at]
        return move.context_query.cpu(), move.context_mean.cpu()  # type: ignore[attr-defined]

    found: dict[int, int] = {}
    for at in sorted(at for at, move in moves.items() if _context_blocks(move) is not None):
        same = (
            lead
            for lead in dict.fromkeys(found.values())
            if _context_blocks(moves[lead]) == _context_blocks(moves[at])
            and all(torch.equal(a, b) for a, b in zip(reading(lead), reading(at), strict=True))
        )
        found[at] = next(same, at)
    return found


def _two_dimensional(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 2


def _columns_before(mask: Any, start: Tensor, rows: int, count: int, device: torch.device) -> Tensor:
    """(rows, count) bool: the real columns whose position without pads is before that of the prompt's last token, (rows, 1)."""
    real = torch.ones(rows, count, dtype=torch.bool, device=device)
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= count:
        real = mask[:, :count].to(device).bool()
    return real & (real.long().cumsum(dim=1) - 1 < start.to(device))


def _forget_compiled() -> None:
    """Drop compiled code: it does not look at a module's hooks again. Without torch.compile in use this costs nothing."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _refuse_paged(*args: Any, **kwargs: Any) -> Any:
    raise SteeringError(
        "Continuous batching packs rows in a way that this version cannot steer: use model.generate, or detach first."
    )
