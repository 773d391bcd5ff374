"""`Landscape`: the artefact. Energy models of the chosen layers, the rule that steers by them, and where they come from."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import re
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elsteer import landscape_hub
from elsteer.card import landscape_card
from elsteer.energy.descent import Descent
from elsteer.energy.tensors import check_guard, check_tensors
from elsteer.errors import LandscapeError, ModelError
from elsteer.landscape_files import read_folder, write_folder
from elsteer.models import Fingerprint, decoder_blocks, differences, encode_chat, fingerprint, hidden_size
from elsteer.steering import Move, Steering
from elsteer.steering.methods import METHODS
from elsteer.steering.methods.els import els
from elsteer.steering.rule import SteeringRule

__all__ = ["Landscape", "SteeringRule", "holds"]

logger = logging.getLogger(__name__)


class Landscape:
    """Energy models by layer, and how to steer by them.

    rule: how it steers; its layers are among those of `tensors`, and only they are saved.
    tensors: by decoder block, the tensors of its energy model (`EnergyModels.tensors_of`).
    guards: by decoder block, (d, k) float32 with orthonormal columns: the directions that steering leaves as they are.
    fingerprint: of the model and chat template that it was fitted to.
    provenance: how it was made, a dictionary of what JSON can hold. "figures" (in the format of the files under results/)
        becomes a table of the model card, "license" its licence (default apache-2.0).
    method: a name in METHODS; "random" is the negative control.
    Raises LandscapeError where these do not fit together.
    """

    def __init__(
        self,
        rule: SteeringRule,
        tensors: dict[int, dict[str, Tensor]],
        guards: dict[int, Tensor] | None,
        fingerprint: Fingerprint,
        provenance: dict[str, Any] | None = None,
        method: str = "els",
    ) -> None:
        self.rule, self.fingerprint, self.method = rule, fingerprint, method
        self.tensors = {layer: dict(tensors[layer]) for layer in sorted(tensors)}
        self.guards = dict(guards or {})
        self.provenance: dict[str, Any] = _plain(provenance or {})
        for layer, named in self.tensors.items():
            check_tensors(layer, named, fingerprint.hidden_size)
        for layer, guard in self.guards.items():
            check_guard(layer, guard, fingerprint.hidden_size)
        self._check_rule()

    def _check_rule(self) -> None:
        if self.method not in METHODS:
            known = ", ".join(METHODS)
            raise LandscapeError(f"The method '{self.method}' is not known: this elsteer knows {known}; upgrade it.")
        if lacking := [layer for layer in self.rule.layers if layer not in self.tensors]:
            raise LandscapeError(f"The rule steers layer {lacking[0]}, for which the landscape has no energy model.")
        if beyond := [layer for layer in self.tensors if not 0 <= layer < self.fingerprint.num_layers]:
            blocks = self.fingerprint.num_layers
            raise LandscapeError(
                f"The landscape has an energy model for layer {beyond[0]} of a model of {blocks} blocks."
            )
        if self.rule.guard and (lacking := [layer for layer in self.rule.layers if layer not in self.guards]):
            raise LandscapeError(f"The rule asks for the guard, and layer {lacking[0]} has none: set guard=False.")

    def __repr__(self) -> str:
        return f"Landscape({self.fingerprint.name or 'a model'}, method={self.method!r}, {self.rule})"

    # Steering

    def attach(
        self,
        model: PreTrainedModel,
        strength: Tensor | float | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        blocks: str | None = None,
        allow_other_model: bool = False,
    ) -> Steering:
        """Steer `model` until the handle is removed or its `with` block ends.

        strength: multiplies the step; a number, or a tensor with one per row of the batch; default: the rule's. 0 is bit for
            bit the plain model.
        tokenizer: its chat template is compared too. blocks: the dotted path of the decoder blocks, if they are not found;
            kept on the model.
        allow_other_model: steer, with a warning, a model that is not the one it was fitted to but as wide, such as
            another fine-tuning of it.
        Raises LandscapeError saying what differs, SteeringError for a strength that is negative or not finite.
        """
        plain: PreTrainedModel = getattr(model, "_orig_mod", model)  # torch.compile wraps the model
        if blocks is not None:
            decoder_blocks(plain, blocks)
            plain.elsteer_blocks = blocks  # as `elsteer.load` keeps it: whatever looks for the blocks finds these
        self._check_model(plain, tokenizer, allow_other_model)
        if strength is None:
            strength = self.rule.strength
            if strength == 0:
                logger.warning(
                    "this landscape has strength 0, as a fit sets it where nothing helps: the plain model runs"
                )
        with torch.inference_mode(False):  # tensors made within it could take part in no backward pass after it
            moves = {layer: self.move(layer) for layer in self.rule.layers}
            return Steering(model, moves, window=self.rule.window, strength=strength, blocks=blocks)

    def _check_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, allow: bool) -> None:
        found = _differences(self.fingerprint, model, tokenizer)
        if not found:
            return
        ours = self.fingerprint.name or "another model"
        as_wide = hidden_size(model) == self.fingerprint.hidden_size
        if allow and as_wide:
            logger.warning("steering with a landscape that was fitted to %s, although %s", ours, "; ".join(found))
            return
        way = (
            ""
            if not as_wide
            else ", or if you know that they are alike enough, attach it from Python with allow_other_model=True"
        )
        as_it_was = f"with revision {self.fingerprint.pin}" if self.fingerprint.pin else "as it was"
        raise LandscapeError(
            f"This landscape was fitted to {ours} and does not fit here, as {'; '.join(found)}: load that model {as_it_was}, or "
            f"fit a landscape for this one with `elsteer fit`{way}."
        )

    def move(self, layer: int) -> Move:
        """What moves the states of `layer` by the rule; made anew at each call."""
        return METHODS[self.method](layer, self._tensors(layer), self.guards.get(layer), self.rule)

    def descent(self, layer: int) -> Descent:
        """The steps down the energy of `layer`, whatever the method."""
        return els(layer, self._tensors(layer), self.guards.get(layer), self.rule)

    def energy(self, layer: int, states: Tensor, context: Tensor | None = None) -> Tensor:
        """Energies (n,) of states (n, d) of `layer`, in float32 on their device.

        context: (n, H, C) of `elsteer.energy.context`, for energies that read one; the average one by default.
        """
        return self.descent(layer).to(states.device).energy(states, context)

    @property
    def asked_with(self) -> dict[str, Any]:
        """The settings that its prompts were asked with (`system`, `thinking` and others); empty where they are not told."""
        settings = self.provenance.get("settings")
        found = settings.get("collect") if isinstance(settings, dict) else None
        return dict(found) if isinstance(found, dict) else {}

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, (1, tokens) each, of a chat as the fit asked its own.

        That is with its thinking mode and, for a chat without one, its system prompt: steering is fitted to where such a chat
        ends. Raises ModelError where the template does not take the chat.
        """
        asked = self.asked_with
        ids = encode_chat(tokenizer, messages, system=asked.get("system"), thinking=asked.get("thinking"))
        found = torch.tensor([ids], device=device)
        return {"input_ids": found, "attention_mask": torch.ones_like(found)}

    def digest(self) -> str:
        """SHA-256 of the tensors and guards of the rule's layers: the same in every process and on every machine."""
        found = hashlib.sha256()
        for layer in self.rule.layers:
            named = self.tensors[layer] | ({"guard": self.guards[layer]} if layer in self.guards else {})
            for name, tensor in sorted(named.items()):
                found.update(f"{layer}.{name} {tuple(tensor.shape)}\n".encode())
                found.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def _tensors(self, layer: int) -> dict[str, Tensor]:
        if layer not in self.tensors:
            known = ", ".join(map(str, self.tensors))
            raise LandscapeError(f"The landscape has no energy model for layer {layer}, only for {known}.")
        return self.tensors[layer]

    # Others like it

    def with_rule(self, **changes: Any) -> Landscape:
        """The same energy models under a changed rule: with_rule(eta=0.1, window=2). The tensors are shared."""
        return self._changed(rule=dataclasses.replace(self.rule, **changes))

    def with_method(self, method: str) -> Landscape:
        """The same landscape moving by another method: "random" makes the negative control of it."""
        return self._changed(method=method)

    def with_provenance(self, **entries: Any) -> Landscape:
        """The same landscape with entries added to its provenance."""
        return self._changed(provenance=_plain({**self.provenance, **entries}))

    def _changed(self, **attributes: Any) -> Landscape:
        # The tensors were checked when this one was made: tuning calls this for every trial.
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, **attributes)
        other._check_rule()
        return other

    # Files

    def save_pretrained(self, path: str | Path, *, name: str | None = None) -> None:
        """Write config.json, model.safetensors and a model card to the folder `path`, whole or not at all.

        A landscape that is there is replaced; any other folder that is not empty is refused. name: what the card calls it,
        default `path`. Raises LandscapeError, or RunError when the disk is full.
        """
        config = {
            "elsteer_version": _elsteer_version(),
            "method": self.method,
            "rule": self.rule.to_dict(),
            "fingerprint": self.fingerprint.to_dict(),
            "provenance": self.provenance,
        }
        tensors = {f"layers.{at}.{key}": t for at in self.rule.layers for key, t in self.tensors[at].items()}
        tensors |= {f"guards.{at}": self.guards[at] for at in self.rule.layers if at in self.guards}
        card = landscape_card(
            name=name or str(path),
            rule=self.rule,
            fingerprint=self.fingerprint,
            provenance=self.provenance,
            method=self.method,
        )
        write_folder(Path(path), config, {key: tensor.detach().float() for key, tensor in tensors.items()}, card)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> Self:
        """Read a landscape from a folder or from the hub (its local cache where the hub does not answer within seconds).

        revision: a branch, tag or commit of the hub. Raises LandscapeError saying what is missing, damaged or too new.
        """
        name = str(path_or_id)
        folder = landscape_hub.find(path_or_id, revision=revision, token=token, cache_dir=cache_dir)
        config, tensors = read_folder(folder, name)
        try:
            found = Fingerprint.from_dict(config.get("fingerprint"))
            rule = SteeringRule.from_dict(config.get("rule"))
            provenance, method = config.get("provenance"), config.get("method")
            if not isinstance(provenance, dict) or not isinstance(method, str):
                raise LandscapeError("The provenance must be an object and the method a text.")
            layers, guards = _by_layer(tensors)
            read = cls(rule, layers, guards, found, provenance, method)
            system, thinking = (read.asked_with.get(name) for name in ("system", "thinking"))
            if not isinstance(system, str | None) or not isinstance(thinking, bool | None):
                raise LandscapeError(
                    "The system prompt of its settings must be text and the thinking mode true or false."
                )
            return read
        except (LandscapeError, ModelError) as error:
            raise LandscapeError(f"{name} cannot be used: {_lower(str(error))}") from error

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload landscape",
    ) -> str:
        """Upload to the hub, making the repository if it is not there; its address. Raises LandscapeError.

        Of the path of a local model only the last part goes along.
        """
        known = self.fingerprint
        if known.is_local:
            known = dataclasses.replace(known, name=f"./{Path(str(known.name)).name}")
        with tempfile.TemporaryDirectory() as folder:
            self._changed(fingerprint=known).save_pretrained(Path(folder) / "landscape", name=repo_id)
            return landscape_hub.upload(
                Path(folder) / "landscape", repo_id, private=private, token=token, message=commit_message
            )


def holds(run_dir: Path, landscapes: Iterable[Landscape]) -> bool:
    """Whether the landscape of the run folder is one of `landscapes`, by its energies."""
    folder = (run_dir / "landscape").resolve()
    if not folder.is_dir():
        return False
    try:
        found = Landscape.from_pretrained(folder).digest()
    except LandscapeError:
        return False
    return found in [one.digest() for one in landscapes]


def _differences(ours: Fingerprint, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    if tokenizer is not None:
        return differences(ours, fingerprint(model, tokenizer, ours.thinking))
    template = _NoTemplate()
    found = fingerprint(model, template, None)  # of a tokenizer, only the template is looked at
    return differences(ours, dataclasses.replace(found, template_sha256=ours.template_sha256, thinking=ours.thinking))


class _NoTemplate:
    """Stands for a tokenizer whose template is not to be compared."""

    chat_template = "none"


def _by_layer(tensors: dict[str, Tensor]) -> tuple[dict[int, dict[str, Tensor]], dict[int, Tensor]]:
    """Of "layers.14.weight" and "guards.14": the tensors of each layer, and the guards."""
    layers: dict[int, dict[str, Tensor]] = {}
    guards: dict[int, Tensor] = {}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition(".")
        layer, _, name = rest.partition(".")
        known = re.fullmatch(r"[0-9]{1,6}", layer)
        if known and kind == "layers" and name:
            layers.setdefault(int(layer), {})[name] = tensor
        elif known and kind == "guards" and not name:
            guards[int(layer)] = tensor
        else:
            raise LandscapeError(f"The tensor {key} is none of a landscape's.")
    return layers, guards


def _plain(value: Any) -> Any:
    """`value` as JSON gives it back: lists for tuples, text keys, null for a number that is not finite."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    raise LandscapeError(f"The provenance can hold what JSON can, not {type(value).__name__}.")


def _lower(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]


def _elsteer_version() -> str:
    try:
        return version("elsteer")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
