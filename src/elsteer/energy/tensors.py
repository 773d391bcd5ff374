"""What the tensors of one layer's energy model must be like, for those that come from a file."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from elsteer.errors import LandscapeError

__all__ = ["check_guard", "check_tensors"]


def check_tensors(layer: int, tensors: dict[str, Tensor], hidden_size: int) -> None:
    """Raise LandscapeError unless `tensors` are those of `EnergyModels.tensors_of` or `ProductEnergies.tensors_of`, and finite.

    hidden_size: of the states.
    """
    weight = tensors.get("weight")
    if weight is None or weight.dim() != 2 or not weight.shape[0]:
        raise LandscapeError(f"The energy model of layer {layer} has no weight matrix.")
    width = weight.shape[0]
    wanted: dict[str, tuple[int, ...]] = {
        "weight": (width, hidden_size),
        "bias": (width,),
        "mean": (hidden_size,),
        "scale": (),
    }
    if "norm_weight" in tensors or "norm_bias" in tensors:
        wanted |= {"norm_weight": (width,), "norm_bias": (width,)}
    context = {"context_weight", "context_query", "context_mean", "context_blocks"}
    more = {"length", "bend", "sharpness", "pooled"}
    product = "read_out" not in tensors and tensors.keys() <= wanted.keys() | context | more
    rows = 3 if "sharpness" in tensors else 2  # besides those of the hidden units
    product = product and (width > rows if "bend" in tensors else width == rows)
    if product:
        wanted |= {name: () for name in ("length", "sharpness", "pooled") if name in tensors}
    if product and context & tensors.keys():
        query = tuple(tensors["context_query"].shape) if "context_query" in tensors else ()
        if len(query) != 2:
            raise LandscapeError(
                f"The energy model of layer {layer} reads a context by queries of {query}, not (H, C)."
            )
        wanted |= {"context_query": query, "context_weight": (width, *query), "context_mean": query[1:]}
        wanted["context_blocks"] = (2,)
        blocks = tensors.get("context_blocks", torch.zeros(0))
        first, stop = blocks.tolist() if blocks.shape == (2,) else (0, 0)
        whole = first == int(first) and stop == int(stop) if math.isfinite(first + stop) else False
        if not (whole and 0 <= first < stop <= layer) or query[1] < 1 or query[1] % int(stop - first):
            raise LandscapeError(
                f"The energy model of layer {layer} reads a context of blocks {first:g} to {stop:g} in {query[1]} numbers: they "
                "must lie before it, each with the same share of the numbers."
            )
    if product and "bend" in tensors:
        wanted["bend"] = (width - rows,)
    at = 0
    while (found := tensors.get(f"hidden_weights.{at}")) is not None:
        out = found.shape[0] if found.dim() == 2 else 0
        wanted |= {f"hidden_weights.{at}": (out, width), f"hidden_biases.{at}": (out,)}
        width, at = out, at + 1
    if not product:
        wanted["read_out"] = (width,)
    for name in sorted(wanted.keys() | tensors.keys()):
        shape = tuple(tensors[name].shape) if name in tensors else "missing"
        if shape != wanted.get(name):
            expected = wanted.get(name, "no such tensor")
            raise LandscapeError(f"The energy model of layer {layer} does not fit: {name} is {shape}, not {expected}.")
        _check_finite(f"{name} of layer {layer}", tensors[name])
    for name in ("scale", "length", "sharpness", "pooled"):
        if name in tensors and not float(tensors[name]) > 0:
            raise LandscapeError(f"The energy model of layer {layer} has a {name} that is not above 0.")


def check_guard(layer: int, guard: Tensor, hidden_size: int) -> None:
    """Raise LandscapeError unless `guard` is (hidden_size, k) with orthonormal columns."""
    if guard.dim() != 2 or guard.shape[0] != hidden_size:
        raise LandscapeError(f"The guard of layer {layer} is {tuple(guard.shape)}, not ({hidden_size}, k).")
    _check_finite(f"the guard of layer {layer}", guard)
    columns = guard.double()
    identity = torch.eye(guard.shape[1], dtype=torch.float64, device=guard.device)
    if not torch.allclose(columns.T @ columns, identity, atol=1e-4):
        raise LandscapeError(f"The columns of the guard of layer {layer} are not orthonormal.")


def _check_finite(what: str, tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise LandscapeError(f"{what[0].upper()}{what[1:]} holds numbers that are not finite.")
