"""State store: the decoder blocks' inputs at a few tokens of each prompt, as safetensors shards that can be appended to.

A state is the input of decoder block l at one token, float32, shape (hidden_size,). A shard holds one batch:
`states` (rows, tokens, layers, hidden_size) in float32, `counts` (rows,) how many of its tokens each row has (token 0 is
the prompt's last, token t the t-th generated one), and the rows' prompt ids in its metadata. Where the context of states is
read (`elsteer.energy.context`), it holds besides them `values` (T, C) in float16, the rows' one after the other, and
`lengths` (rows,), how many of them each row has. Shards are whole or absent; a row that stands in two shards (a batch redone
after a crash) is read from the later one.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from elsteer.errors import RunError
from elsteer.files import write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["StateStore", "mapped_tensor", "watch_states"]


class StateStore:
    """Shards of states in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._known: dict[Path, list[str]] = {}  # the ids of shards that were looked into

    def shards(self) -> list[Path]:
        """Finished shards, oldest first."""
        return sorted(self.folder.glob("[0-9]*.safetensors"))

    def append(
        self, ids: Sequence[str], states: Tensor, counts: Tensor, values: Sequence[Tensor] | None = None
    ) -> None:
        """Add one shard; see the module's text for shapes. values: (T, C) of each row. Raises RunError when the disk is full."""
        last = self.shards()
        number = int(last[-1].stem) + 1 if last else 0
        tensors = {"states": states.float().contiguous().cpu(), "counts": counts.to(torch.int32).cpu()}
        if values is not None:
            most = torch.finfo(torch.float16).max
            tensors["values"] = torch.cat([one.cpu() for one in values]).clamp(-most, most).half()
            tensors["lengths"] = torch.tensor([len(one) for one in values], dtype=torch.int32)
        metadata = {"ids": json.dumps(list(ids))}
        whole = save(tensors, metadata=metadata)  # safetensors' own writing hides a full disk behind another error
        write_atomic(self.folder / f"{number:06d}.safetensors", lambda to: to.write_bytes(whole))

    def ids(self) -> set[str]:
        """The prompts whose states are here."""
        return set(self._places())

    def read(
        self,
        ids: Sequence[str],
        *,
        tokens: int | None = None,
        layers: slice | None = None,
        dtype: torch.dtype = torch.float32,
        mapped: Path | None = None,
    ) -> tuple[Tensor, Tensor]:
        """States (n, tokens, layers, hidden_size) and counts (n,) of the prompts `ids`, in their order.

        layers: those to read (all by default), so that memory need not hold all layers of many prompts at once. mapped: a
        file to be made, as large as the states, that they are mapped from, so that memory holds what is in use.
        Raises RunError when a prompt's states are missing or a shard is damaged.
        """
        states: Tensor | None = None
        counts = torch.zeros(len(ids), dtype=torch.int32)
        for shard, pairs in self._by_shard(ids).items():
            with _open(shard) as file:
                block = torch.from_numpy(file.get_slice("states")[:, :tokens, layers or slice(None)]).to(dtype)
                if states is not None and states.shape[1:] != block.shape[1:]:
                    raise RunError(
                        f"{self.folder} holds states of different shapes, collected with different settings: delete that "
                        "folder and run the collection again."
                    )
                if states is None:
                    shape = (len(ids), *block.shape[1:])
                    states = torch.zeros(shape, dtype=dtype) if mapped is None else mapped_tensor(shape, dtype, mapped)
                to, by = torch.tensor(pairs).T
                states[to] = block[by]
                counts[to] = torch.from_numpy(file.get_tensor("counts"))[by].clamp_max(block.shape[1])
        return (states if states is not None else torch.zeros(0, 0, 0, 0)), counts

    def values(self, ids: Sequence[str], *, mapped: Path) -> list[Tensor]:
        """Values (T, C), float16, of the prompts `ids`, in their order, mapped from a file that is made.

        Raises RunError when a prompt's values are missing or a shard is damaged.
        """
        by_shard = self._by_shard(ids)
        starts, width = {}, 0  # where the values of a shard's rows start, and an end
        for shard in by_shard:
            with _open(shard) as file:
                starts[shard] = [0, *file.get_tensor("lengths").cumsum().tolist()]
                width = max(width, file.get_slice("values").get_shape()[1])  # 1 where no prompt has two tokens
        found: list[Tensor] = [torch.zeros(0, width, dtype=torch.float16)] * len(ids)
        total = sum(
            starts[shard][row + 1] - starts[shard][row] for shard, pairs in by_shard.items() for _, row in pairs
        )
        flat, done = mapped_tensor((total, width), torch.float16, mapped), 0
        for shard, pairs in by_shard.items():
            with _open(shard) as file:
                block = torch.from_numpy(file.get_tensor("values"))
            for at, row in pairs:
                some = block[starts[shard][row] : starts[shard][row + 1]]
                found[at] = flat[done : done + len(some)]
                found[at][:], done = some, done + len(some)
        return found

    def _by_shard(self, ids: Sequence[str]) -> dict[Path, list[tuple[int, int]]]:
        """By shard, the places in `ids` and in the shard. Raises RunError when a prompt is in none."""
        places = self._places()
        if missing := [one for one in ids if one not in places]:
            raise RunError(f"{self.folder} lacks the states of {len(missing)} prompts: run the collection again.")
        found: dict[Path, list[tuple[int, int]]] = {}
        for at, one in enumerate(ids):
            shard, row = places[one]
            found.setdefault(shard, []).append((at, row))
        return found

    def _places(self) -> dict[str, tuple[Path, int]]:
        places: dict[str, tuple[Path, int]] = {}
        for shard in self.shards():
            if shard not in self._known:
                with _open(shard) as file:
                    self._known[shard] = json.loads(file.metadata()["ids"])
            places.update((one, (shard, row)) for row, one in enumerate(self._known[shard]))
        return places


def mapped_tensor(shape: tuple[int, ...], dtype: torch.dtype, path: Path) -> Tensor:
    """An uninitialised tensor mapped from a new file at `path`. Raises RunError when that cannot be made, and leaves none."""
    count = math.prod(shape)
    try:
        with path.open("wb") as file:  # pages of a full disk would end the process: room is made first
            make = getattr(os, "posix_fallocate", None)  # not on macOS
            size = max(1, count * dtype.itemsize)
            file.truncate(size) if make is None else make(file.fileno(), 0, size)
    except OSError as error:
        with suppress(OSError):  # a disk that may not be written to
            path.unlink(missing_ok=True)  # what it has of the room, others need
        what = f"a file of {count * dtype.itemsize / 2**20:.1f} MiB in {path.parent}"
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RunError(f"There could not be made {what}: {error.strerror or error}.") from error
        raise RunError(
            f"No space left on the disk for {what} ({error.strerror}): free some and run the same command again to go on."
        ) from error
    return torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(shape)


@contextmanager
def _open(shard: Path) -> Iterator[Any]:
    try:
        with safe_open(shard, framework="numpy") as file:  # with "pt", Ctrl-C would come as a ValueError
            yield file
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{shard} is damaged: delete it and run the same command again to collect it anew.") from error


@contextmanager
def watch_states(blocks: nn.ModuleList) -> Iterator[list[Tensor | None]]:
    """While open, the list holds the last token's input of every block in the latest forward pass, (B, hidden_size) each."""
    latest: list[Tensor | None] = [None] * len(blocks)

    def hook(at: int) -> Any:
        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            latest[at] = hidden[:, -1].detach().float()

        return keep

    handles = [block.register_forward_pre_hook(hook(at), with_kwargs=True) for at, block in enumerate(blocks)]
    try:
        yield latest
    finally:
        for handle in handles:
            handle.remove()
