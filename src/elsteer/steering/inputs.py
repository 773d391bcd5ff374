"""Reading what a model or its `generate` was given: pads, positions, options that steering cannot follow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from elsteer.errors import SteeringError
from elsteer.models import cache_given

__all__ = ["generation_is_plain", "inferred_mask", "left_padded", "positions", "refuse_options"]

# Options of `generate` that run the model in ways the window does not describe: name, reason.
_REFUSED = {
    "assistant_early_exit": "its drafts run only some of the blocks",
    "use_mtp": "its drafts come from the model's own extra heads",
    "token_healing": "it changes where the prompt ends",
    "guidance_scale": "it runs a second sequence through the model beside the prompt",
}


def as_strength(value: Tensor | float | str) -> Tensor | float:
    """A number, or one per row of the batch, float32. Raises SteeringError for anything else, or what is negative."""
    wanted = "strength is one finite number, or a tensor with one finite number per row of the batch"
    try:
        values = torch.as_tensor(float(value) if isinstance(value, str) else value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SteeringError(f"{wanted}, not {value!r}.") from error
    if values.dim() > 1 or not bool(torch.isfinite(values).all()):
        raise SteeringError(f"{wanted}.")
    if bool((values < 0).any()):
        raise SteeringError("strength must not be negative: that would be a step back, towards false refusals.")
    return values if values.dim() == 1 else float(values)


def positions(
    kwargs: dict[str, Any], rows: int, width: int, seen: int | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Positions without pads (B, q) and which of the new tokens are real (B, q)."""
    mask, given = kwargs.get("attention_mask"), kwargs.get("position_ids")
    real = torch.ones(rows, width, dtype=torch.bool, device=device)
    if seen is None and width == 1 and isinstance(given, Tensor) and given.dim() == 2:
        return given.to(device).expand(rows, width), real  # a fixed mask does not tell which column is the new one
    if isinstance(mask, Tensor) and mask.dim() == 2:
        columns = slice(mask.shape[1] - width, None) if seen is None else slice(seen, seen + width)
        if mask.shape[1] >= width + (seen or 0):
            real = mask[:, columns].to(device).bool()
            return (mask.to(device).long().cumsum(dim=1) - 1)[:, columns], real
    if isinstance(given, Tensor) and given.dim() == 2:
        return given.to(device).expand(rows, width), real
    return (torch.arange(width, device=device) + (seen or 0)).expand(rows, width), real


def _option(model: PreTrainedModel, kwargs: dict[str, Any], name: str) -> Any:
    """An option of `generate`: its own argument, else the given generation config's, else the model's."""
    configs = (kwargs.get("generation_config"), getattr(model, "generation_config", None))
    found = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in found if value is not None), None)


def refuse_options(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    for name, reason in _REFUSED.items():
        value = _option(model, kwargs, name)
        if value is not None and value is not False and value != (1 if name == "guidance_scale" else None):
            raise SteeringError(
                f"generate({name}={value}) cannot be steered, as {reason}: leave it out, or detach first."
            )


def generation_is_plain(model: PreTrainedModel, kwargs: dict[str, Any]) -> bool:
    """Whether `generate` runs one token of every row a step, so that steps tell where it is: no drafts, no loop of the user's."""
    named = ("assistant_model", "prompt_lookup_num_tokens", "penalty_alpha", "custom_generate")
    return all(_option(model, kwargs, name) is None for name in named)


def inferred_mask(model: PreTrainedModel, ids: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """The mask that `generate` infers from pad tokens where none is given."""
    pad, ends = _option(model, kwargs, "pad_token_id"), _option(model, kwargs, "eos_token_id")
    if pad is None or ids.dim() != 2 or ids.is_floating_point() or pad in (ends if isinstance(ends, list) else [ends]):
        return None
    return ids.ne(pad).long() if bool((ids == pad).any()) else None


def left_padded(kwargs: dict[str, Any], mask: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Right-padded inputs of `generate`, turned: it reads the last column, which would be a pad."""
    if bool((mask[:, -1] != 0).all()):
        return kwargs, mask
    width = mask.shape[1]
    index = (torch.arange(width, device=mask.device) + mask.sum(dim=1, keepdim=True)) % width
    cache = cache_given(kwargs)
    if (cache is not None and int(cache.get_seq_length())) or not bool(
        (mask.gather(1, index).long().diff(dim=1) >= 0).all()
    ):
        raise SteeringError("The attention mask has pads behind or between the tokens: pad on the left.")
    turned = {"attention_mask": mask.gather(1, index)}
    for name, value in kwargs.items():
        if name != "attention_mask" and isinstance(value, Tensor) and value.shape[:2] == mask.shape:
            at = index.to(value.device)
            turned[name] = value.gather(1, at.view(*at.shape, *[1] * (value.dim() - 2)).expand_as(value))
    return {**kwargs, **turned}, turned["attention_mask"]
