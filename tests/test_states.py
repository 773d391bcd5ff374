"""The store of states, and that what is captured is what transformers itself calls the hidden states."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from elsteer.decoding import decode, prefill, share_prefix
from elsteer.errors import RunError
from elsteer.models import decoder_blocks
from elsteer.states import StateStore, watch_states
from tiny import FAMILIES, tiny_model

PROMPTS = [[200, 11, 5, 9, 33, 71], [200, 11, 40], [200, 11, 7, 88, 21, 3, 3, 60]]


def shard(rows: int, start: float = 0.0, tokens: int = 2) -> tuple[Tensor, Tensor]:
    states = torch.arange(rows * tokens * 3 * 4, dtype=torch.float32).reshape(rows, tokens, 3, 4) + start
    return states, torch.full((rows,), tokens, dtype=torch.int32)


def test_what_is_appended_is_read_back_in_the_order_asked_for(tmp_path: Path) -> None:
    store = StateStore(tmp_path / "states")
    assert store.ids() == set()
    first, second = shard(2), shard(3, 1000.0)
    store.append(["a", "b"], *first)
    store.append(["c", "d", "e"], *second)
    states, counts = store.read(["d", "a", "e", "b"])
    wanted = torch.stack([second[0][1], first[0][0], second[0][2], first[0][1]])
    assert torch.equal(states, wanted)
    assert counts.tolist() == [2, 2, 2, 2]
    assert store.ids() == set("abcde")


def test_a_store_is_opened_again_and_appended_to(tmp_path: Path) -> None:
    StateStore(tmp_path).append(["a"], *shard(1))
    StateStore(tmp_path).append(["b"], *shard(1, 50.0))
    assert [path.name for path in StateStore(tmp_path).shards()] == ["000000.safetensors", "000001.safetensors"]
    assert torch.equal(StateStore(tmp_path).read(["b"])[0], shard(1, 50.0)[0])


def test_the_later_shard_wins(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    store.append(["a", "b"], *shard(2))
    store.append(["b"], *shard(1, 500.0))
    assert torch.equal(store.read(["b"])[0], shard(1, 500.0)[0])
    assert torch.equal(store.read(["a"])[0], shard(2)[0][:1])


def test_some_layers_only_in_another_type_and_mapped_from_a_file(tmp_path: Path) -> None:
    store = StateStore(tmp_path / "states")
    states, _ = shard(3)
    store.append(["a", "b", "c"], *shard(3))
    found, _ = store.read(["c", "a"], layers=slice(1, 3), dtype=torch.float64)
    assert found.dtype == torch.float64
    assert torch.equal(found, states[[2, 0], :, 1:3].double())
    mapped, _ = store.read(["c", "a"], layers=slice(1, 3), mapped=tmp_path / "map")
    assert torch.equal(mapped, states[[2, 0], :, 1:3])
    assert (tmp_path / "map").stat().st_size == mapped.numel() * 4


def test_no_room_for_a_mapped_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = StateStore(tmp_path / "states")
    store.append(["a"], *shard(1))
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(RunError, match=r"No space left.*free some"):
        store.read(["a"], mapped=tmp_path / "map")
    assert not (tmp_path / "map").exists(), "what it had of the disk is given back"
    with pytest.raises(RunError, match="could not be made"):
        store.read(["a"], mapped=tmp_path / "nowhere/map")


def test_some_tokens_only(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    states, _ = shard(2, tokens=3)
    store.append(["a", "b"], states, torch.tensor([3, 1]))
    found, counts = store.read(["a", "b"], tokens=2)
    assert torch.equal(found, states[:, :2])
    assert counts.tolist() == [2, 1]


def test_half_precision_states_are_kept_in_float32(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    store.append(["a"], shard(1)[0].bfloat16(), torch.tensor([2]))
    assert store.read(["a"])[0].dtype == torch.float32


def test_no_prompt_at_all(tmp_path: Path) -> None:
    states, counts = StateStore(tmp_path).read([])
    assert len(states) == len(counts) == 0


def test_missing_states_are_an_error(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    store.append(["a"], *shard(1))
    with pytest.raises(RunError, match="lacks the states of 2 prompts"):
        store.read(["a", "x", "y"])


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_shard_is_named(tmp_path: Path, keep: int) -> None:
    store = StateStore(tmp_path)
    store.append(["a"], *shard(1))
    path = store.shards()[0]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RunError, match=r"000000\.safetensors is damaged: delete it"):
        store.ids()


def test_a_foreign_file_among_the_shards_is_named(tmp_path: Path) -> None:
    save_file({"states": torch.zeros(1)}, tmp_path / "000000.safetensors")
    with pytest.raises(RunError, match="is damaged"):
        StateStore(tmp_path).ids()


def test_shards_of_different_settings_do_not_fit_together(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    store.append(["a"], *shard(1, tokens=2))
    store.append(["b"], *shard(1, tokens=3))
    with pytest.raises(RunError, match="different shapes"):
        store.read(["a", "b"])
    assert store.read(["a", "b"], tokens=2)[0].shape == (2, 2, 3, 4)


def test_a_full_disk_says_so_and_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = StateStore(tmp_path)
    store.append(["a"], *shard(1))

    def full(_self: Path, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(RunError, match="No space left on the disk"):
            store.append(["b"], *shard(1))
    assert [path.name for path in tmp_path.iterdir()] == ["000000.safetensors"]
    assert store.ids() == {"a"}


def test_a_half_written_shard_of_a_crash_is_no_shard(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    store.append(["a"], *shard(1))
    (tmp_path / ".000001.safetensors.x7").write_bytes(b"half")
    assert store.ids() == {"a"}


# What is captured


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_the_hidden_states_of_transformers(family: str) -> None:
    """State l = hidden_states[l]: the input of block l, of the prompt's last token and of the generated ones."""
    model = tiny_model(family)
    batch = prefill(model, PROMPTS, [0, 1, 2], share_prefix(model, PROMPTS))
    kept: list[Tensor] = []
    with watch_states(decoder_blocks(model)) as latest:
        done = decode(
            model,
            batch,
            max_new_tokens=3,
            end_ids=set(),
            on_step=lambda _step, _alive: kept.append(torch.stack([one.clone() for one in latest], dim=1)),
        )
    assert not any(block._forward_pre_hooks for block in decoder_blocks(model))
    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            out = model(input_ids=torch.tensor([[*prompt, *done.tokens[row]]]), output_hidden_states=True)
        for step in range(3):
            wanted = torch.stack([h[0, len(prompt) - 1 + step] for h in out.hidden_states[:4]])
            torch.testing.assert_close(kept[step][row], wanted, atol=1e-4, rtol=1e-4)


def test_states_of_a_half_precision_model_come_as_float32() -> None:
    model = tiny_model().bfloat16()
    with watch_states(decoder_blocks(model)) as latest, torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]))
    assert all(one is not None and one.dtype == torch.float32 and one.shape == (1, 32) for one in latest)


def test_watching_ends_with_an_exception_too() -> None:
    model = tiny_model()
    with pytest.raises(KeyError), watch_states(decoder_blocks(model)):
        raise KeyError
    assert not any(block._forward_pre_hooks for block in decoder_blocks(model))


def test_values_are_read_back_by_row_from_the_later_shard(tmp_path: Path) -> None:
    store = StateStore(tmp_path / "states")
    values = [torch.randn(count, 6, dtype=torch.bfloat16) for count in (3, 0, 5, 2)]
    store.append(["a", "b", "c"], *shard(3), values=[values[0], values[1], torch.zeros(4, 6)])
    store.append(["c", "d"], *shard(2), values=values[2:])
    store.append(["e"], *shard(1), values=[torch.full((1, 6), 1e9)])  # beyond what float16 holds
    store.append(["f"], *shard(1), values=[torch.zeros(0, 1)])  # prompts of one token
    found = store.values(["d", "a", "b", "c", "e", "f"], mapped=tmp_path / "mapped")
    for one, wanted in zip(found, (values[3], values[0], values[1], values[2]), strict=False):
        torch.testing.assert_close(one, wanted.half(), atol=0, rtol=0)
    assert torch.isfinite(found[4]).all()
    assert len(found[5]) == 0
    with pytest.raises(RunError, match="lacks the states of 1 prompts"):
        store.values(["a", "x"], mapped=tmp_path / "again")
