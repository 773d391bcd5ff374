"""`SteeringRule`: how a landscape steers, in a few numbers."""

from __future__ import annotations

import re
import reprlib
from dataclasses import asdict, dataclass, fields
from typing import Any

from elsteer.errors import LandscapeError

__all__ = ["SteeringRule"]

MOST_STEPS, LONGEST = 1000, 10**9  # so that a file from elsewhere cannot keep a machine busy for ever


@dataclass(frozen=True, slots=True)
class SteeringRule:
    """How a landscape steers. Raises LandscapeError for values that mean nothing.

    layers: the decoder blocks whose input is moved, ascending.
    eta: length of a step in units of the root-mean-square distance of the layer's states from their mean; steps: K of them in
    each layer.
    window: how many generated tokens after the prompt's last token are steered; 0: the last prompt token alone.
    gates: by layer, the energy tau at or below which a state stays; a layer without one, or None, moves every state.
    guard: whether the harmfulness directions are left as they are.
    strength: what `attach` multiplies eta by unless told otherwise; 0 where tuning found nothing that helps.
    """

    layers: tuple[int, ...]
    eta: float
    steps: int
    window: int
    gates: dict[int, float] | None = None
    guard: bool = True
    strength: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        layers = self.layers
        ordered = all(_is_int(layer) and layer >= 0 for layer in layers) and list(layers) == sorted(set(layers))
        _demand(bool(layers) and ordered, "layers", "decoder blocks in ascending order, at least one", list(layers))
        _demand(_is_number(self.eta) and self.eta > 0, "eta", "a finite number above 0", self.eta)
        _demand(
            _is_int(self.steps) and 1 <= self.steps <= MOST_STEPS,
            "steps",
            f"a whole number from 1 to {MOST_STEPS}",
            self.steps,
        )
        _demand(
            _is_int(self.window) and 0 <= self.window <= LONGEST,
            "window",
            f"a whole number from 0 to {LONGEST}",
            self.window,
        )
        _demand(isinstance(self.guard, bool), "guard", "true or false", self.guard)
        _demand(
            _is_number(self.strength) and self.strength >= 0, "strength", "a finite number from 0 up", self.strength
        )
        if self.gates is not None:
            fit = isinstance(self.gates, dict) and all(_is_int(layer) for layer in self.gates)
            fit = fit and all(_is_number(gate) for gate in self.gates.values())
            _demand(fit, "gates", "a finite energy for each layer that has one", self.gates)
            kept = {layer: float(self.gates[layer]) for layer in layers if layer in self.gates}
            object.__setattr__(self, "gates", kept)

    def gate(self, layer: int) -> float | None:
        """The energy at or below which a state of `layer` stays, or None."""
        return None if self.gates is None else self.gates.get(layer)

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object; the layers of the gates become text."""
        value = asdict(self) | {"layers": list(self.layers)}
        if self.gates is not None:
            value["gates"] = {str(layer): gate for layer, gate in self.gates.items()}
        return value

    @classmethod
    def from_dict(cls, value: Any) -> SteeringRule:
        """The inverse of `to_dict`. Raises LandscapeError where an entry is missing, unknown or of the wrong kind."""
        names = {field.name for field in fields(cls)}
        if not isinstance(value, dict) or set(value) != names:
            found = ", ".join(sorted(map(str, value))) if isinstance(value, dict) else type(value).__name__
            raise LandscapeError(f"The steering rule must have the entries {', '.join(sorted(names))}, not {found}.")
        _demand(isinstance(value["layers"], list), "layers", "a list", value["layers"])
        gates = value["gates"]
        if isinstance(gates, dict):
            _demand(
                all(re.fullmatch("[0-9]{1,6}", str(layer)) for layer in gates), "gates", "one energy a layer", gates
            )
            gates = {int(layer): gate for layer, gate in gates.items()}
        return cls(**{**value, "layers": tuple(value["layers"]), "gates": gates})


def _demand(true: bool, name: str, wanted: str, found: object) -> None:
    if not true:
        raise LandscapeError(f"The steering rule's {name} must be {wanted}, not {reprlib.repr(found)}.")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
