"""`Fingerprint`: what a landscape must find again in a model, small enough to stand in its config.json."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elsteer.errors import ModelError
from elsteer.files import expanded, whole_path
from elsteer.models.blocks import decoder_blocks, hidden_size, num_layers
from elsteer.models.chat import effective_thinking, template_hash
from elsteer.models.load import HUB_ID, source_of
from elsteer.models.pins import is_pinned

__all__ = ["Fingerprint", "differences", "fingerprint"]

_VALUES = 8  # of each sampled tensor
_DEPTHS = 4  # blocks that are sampled
_MATRICES = 16  # of each, at most; of more (experts) as many at even distances
_ADAPTERS = ("lora_", "adapter", "modules_to_save", ".base_layer.")  # in the names of an adapter's tensors
# Storing a number as bfloat16 moves it by at most 2^-9 of itself, as float16 by less, unless it is tiny.
_RELATIVE = 2.0**-8
_SHA256 = re.compile("[0-9a-f]{64}")
_FLOOR = 1e-3  # of the sample's RMS, for tiny numbers


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """A model and its chat template, as far as a landscape depends on them.

    thinking: None where the template knows no thinking mode or its default was used.
    weights: of some named tensors spread over the depth, a few values each; the same for the same model in float32,
        bfloat16 and float16 up to rounding.
    """

    name: str | None
    revision: str | None
    architecture: str
    model_type: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    template_sha256: str
    thinking: bool | None
    weights: dict[str, list[float]]

    @property
    def pin(self) -> str | None:
        """The revision that `load` must be given to get this model again, where only the package registry has it."""
        return self.revision if is_pinned(self.name, self.revision) else None

    def revision_of(self, name: str) -> str | None:
        """`pin` where `name` is this model's: the hub's model by that name is not the same to the bit. Else None."""
        return self.pin if name == self.name else None

    @property
    def is_local(self) -> bool:
        """Whether the model was read from a folder or a GGUF file: it has a path, or a revision that the hub does not give.

        Earlier versions recorded a relative path as it was given, which may look like a hub id.
        """
        if self.name is None or self.pin is not None:
            return False
        by_path = not HUB_ID.fullmatch(self.name) or self.name.endswith(".gguf")
        return by_path or (self.revision is not None and _SHA256.fullmatch(self.revision) is not None)

    def named_as(self, name: str | None) -> Fingerprint:
        """This one by `name` where that is another path of the same folder or file: for keys of runs of earlier versions."""
        same = name is not None and str(whole_path(expanded(name))) == self.name
        return replace(self, name=name) if same else self

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Any) -> Fingerprint:
        """The inverse of `to_dict`. Raises ModelError where an entry is missing or of the wrong kind."""
        names = {field.name for field in fields(cls)}
        if not isinstance(value, dict) or names - value.keys():
            missing = ", ".join(sorted(names - value.keys())) if isinstance(value, dict) else "everything"
            raise ModelError(f"The fingerprint of the model is damaged: it lacks {missing}.")
        found = cls(**{name: value[name] for name in names})
        if not _is_sound(found):
            raise ModelError("The fingerprint of the model is damaged: it holds entries of the wrong kind.")
        return found


def _is_sound(found: Fingerprint) -> bool:
    """Whether each entry is of its kind, as `differences` compares and prints them."""
    texts = (found.architecture, found.model_type, found.template_sha256)
    sizes = (found.num_layers, found.hidden_size, found.vocab_size)
    return (
        all(isinstance(text, str) for text in texts)
        and all(isinstance(text, str | None) for text in (found.name, found.revision))
        and all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes)
        and isinstance(found.thinking, bool | None)
        and isinstance(found.weights, dict)
        and all(isinstance(name, str) and isinstance(row, list) for name, row in found.weights.items())
        and all(isinstance(one, int | float) and abs(one) < 1e30 for row in found.weights.values() for one in row)
    )


def fingerprint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, thinking: bool | None = None
) -> Fingerprint:
    """The fingerprint of a model with the chat template that its prompts go through."""
    source = source_of(model)
    config = model.config.get_text_config(decoder=True)
    return Fingerprint(
        name=source["name"],
        revision=source["revision"],
        architecture=type(model).__name__,
        model_type=str(model.config.model_type),
        num_layers=num_layers(model),
        hidden_size=hidden_size(model),
        vocab_size=int(config.vocab_size),
        template_sha256=template_hash(tokenizer),
        thinking=effective_thinking(tokenizer, thinking),
        weights={name: _sample(tensor) for name, tensor in _tensors(model)},
    )


def differences(a: Fingerprint, b: Fingerprint) -> list[str]:
    """What differs between the model of `a` (say, of a landscape) and that of `b`, a sentence each; empty if nothing.

    Name and revision may differ, as long as the weights are the same. Tensors that only one of the two has as ordinary
    numbers (the other is quantised) are not compared; that there is no other is a difference, but where neither has any
    (all of them are kept in a byte or less): such a model is known by its shape and template alone.
    """
    found = [
        f"{label} is {theirs} instead of {ours}"
        for label, ours, theirs in (
            ("the architecture", a.architecture, b.architecture),
            ("the model type", a.model_type, b.model_type),
            ("the number of decoder blocks", a.num_layers, b.num_layers),
            ("the hidden size", a.hidden_size, b.hidden_size),
            ("the vocabulary size", a.vocab_size, b.vocab_size),
        )
        if ours != theirs
    ]
    common = len(a.weights.keys() & b.weights.keys())
    if not found and not common and (a.weights or b.weights):
        found.append("none of the sampled weights of the one is found in the other, so that they cannot be compared")
    elif not found and (names := _unlike(a.weights, b.weights)):
        found.append(
            f"the weights are of another model, of another training or quantisation of it "
            f"({len(names)} of {common} sampled tensors differ, such as {names[0]}: "
            f"{_known(b)} instead of {_known(a)})"
        )
    if adapted := [name for name in b.weights if name not in a.weights and any(one in name for one in _ADAPTERS)]:
        found.append(f"an adapter is loaded ({adapted[0]})")
    if a.template_sha256 != b.template_sha256:
        found.append(f"the chat template is another one ({b.template_sha256[:12]} instead of {a.template_sha256[:12]})")
    if a.thinking != b.thinking:
        found.append(f"the thinking mode is {_mode(b.thinking)} instead of {_mode(a.thinking)}")
    return found


def _known(value: Fingerprint) -> str:
    return f"{value.name or 'an unnamed model'}{f' at {value.revision[:12]}' if value.revision else ''}"


def _mode(thinking: bool | None) -> str:
    return {None: "the template's default", True: "on", False: "off"}[thinking]


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The embeddings, in and out, and of blocks spread over the depth the first vector and the matrices that are numbers.

    Vectors (norms) stay ordinary numbers in quantised models too, so there is something to compare there. All matrices, as
    edits and merged adapters may change one kind alone.
    """
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    chosen = [model.get_input_embeddings().weight]
    blocks = decoder_blocks(model)
    for depth in sorted({round(i * (len(blocks) - 1) / (_DEPTHS - 1)) for i in range(_DEPTHS)}):
        parameters = list(blocks[depth].parameters())
        matrices = [tensor for tensor in parameters if tensor.ndim >= 2]
        chosen += [tensor for tensor in parameters if tensor.ndim == 1][:1]
        chosen += matrices[:: -(-len(matrices) // _MATRICES) or 1]
    outer = model.get_output_embeddings()
    chosen += [outer.weight] if outer is not None and getattr(outer, "weight", None) is not chosen[0] else []
    for tensor in chosen:
        if tensor.is_floating_point() and tensor.element_size() >= 2 and not tensor.is_meta and id(tensor) in names:
            yield names[id(tensor)], tensor


def _sample(tensor: torch.Tensor) -> list[float]:
    """Values at even distances over the flattened tensor, to seven digits."""
    flat = tensor.detach().reshape(-1)
    at = [(2 * i + 1) * flat.numel() // (2 * _VALUES) for i in range(_VALUES)]
    return [float(f"{value:.7g}") for value in flat[torch.tensor(at, device=flat.device)].float().tolist()]


def _unlike(a: dict[str, list[float]], b: dict[str, list[float]]) -> list[str]:
    return [name for name in a if name in b and not _alike(a[name], b[name])]


def _alike(a: list[float], b: list[float]) -> bool:
    if len(a) != len(b):
        return False
    floor = _FLOOR * math.sqrt(sum(value * value for value in a + b) / max(1, len(a + b)))
    return all(abs(x - y) <= floor + _RELATIVE * max(abs(x), abs(y)) for x, y in zip(a, b, strict=True))
