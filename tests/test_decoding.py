"""Batched decoding over reusable prompt caches against plain generate, prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Lfm2Config, Lfm2ForCausalLM, PreTrainedModel

from elsteer.decoding import (
    PromptBatch,
    batches,
    decode,
    first_logits,
    mapped,
    plain_model,
    prefill,
    score,
    share_prefix,
)
from elsteer.errors import ModelError
from elsteer.steering import Steering
from slow import energy_moves, slow_generate, slow_logits
from tiny import FAMILIES, VOCABULARY, tiny_model

PREFIX = [200, 11, 12, 13]
PROMPTS = [[*PREFIX, *own] for own in ([5, 9, 33, 71, 12], [40, 41], [7, 88, 21, 3, 3, 60, 61, 90, 14], [101])]
END = {258}
# Models where columns matter beyond the mask: sliding windows shorter than the prompts, few learnt positions.
AWKWARD: list[tuple[str, dict[str, Any]]] = [
    ("gemma2", {"sliding_window": 4}),
    ("gemma3", {"sliding_window": 4}),
    ("mistral", {"sliding_window": 4}),
    ("gpt2", {"n_positions": 22}),
    ("qwen2", {"max_position_embeddings": 22}),
]
EVERY: list[tuple[str, dict[str, Any]]] = [*((family, {}) for family in FAMILIES), *AWKWARD]


def by_generate(model: PreTrainedModel, prompts: Sequence[Sequence[int]], new: int = 8) -> list[list[int]]:
    rows = []
    for prompt in prompts:
        out = model.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False)[0, len(prompt) :].tolist()
        rows.append(out[: out.index(258)] if 258 in out else out)
    return rows


def prefilled(model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, shared: bool = True) -> PromptBatch:
    prefix = share_prefix(model, prompts if shared else [[1]])
    return prefill(model, prompts, list(range(len(prompts))), prefix)


@pytest.mark.parametrize(("family", "config"), EVERY, ids=str)
def test_decoding_gives_the_tokens_of_generate(family: str, config: dict[str, Any]) -> None:
    model = tiny_model(family, **config)
    batch = prefilled(model, PROMPTS)
    assert decode(model, batch, max_new_tokens=8, end_ids=END).tokens == by_generate(model, PROMPTS)


@pytest.mark.parametrize(("family", "config"), [("qwen2", {}), ("gpt2", {}), *AWKWARD[:3]], ids=str)
def test_steered_decoding_gives_the_tokens_of_the_plain_loop(family: str, config: dict[str, Any]) -> None:
    model, moves = tiny_model(family, **config), energy_moves()
    plain = by_generate(model, PROMPTS)
    with Steering(model, moves, window=2) as steering:
        batch = prefilled(model, PROMPTS)
        found = decode(model, batch, max_new_tokens=8, end_ids=set(), steering=steering).tokens
    assert found == [slow_generate(model, moves, prompt, 8, 2, ends=()) for prompt in PROMPTS]
    assert found != plain


def test_rows_that_stop_leave_the_batch_and_change_nothing_for_the_rest() -> None:
    model, moves = tiny_model(), energy_moves()
    stops = {0: 3, 1: 1, 2: 6, 3: 2}
    batch, passes = prefilled(model, PROMPTS), []
    with Steering(model, moves, window=2) as steering:
        done = decode(
            model,
            batch,
            max_new_tokens=8,
            end_ids=set(),
            decided=lambda i, tokens: len(tokens) >= stops[i],
            steering=steering,
            on_step=lambda step, alive: passes.append((step, list(alive))),
        )
    wanted = [slow_generate(model, moves, prompt, stops[i], 2, ends=()) for i, prompt in enumerate(PROMPTS)]
    assert done.tokens == wanted
    assert done.ended == [False] * 4
    assert passes == [(0, [0, 1, 2, 3]), (1, [0, 2, 3]), (2, [0, 2]), (3, [2]), (4, [2]), (5, [2])]


def test_an_end_token_ends_a_row_and_is_not_among_its_tokens() -> None:
    model = tiny_model()
    plain = by_generate(model, PROMPTS, 8)
    end = plain[0][2]
    done = decode(model, prefilled(model, PROMPTS), max_new_tokens=8, end_ids={end})
    for tokens, ended, whole in zip(done.tokens, done.ended, plain, strict=True):
        assert ended == (end in whole)
        assert tokens == (whole[: whole.index(end)] if ended else whole)
    assert any(done.ended)


@pytest.mark.parametrize(("family", "config"), [("qwen2", {}), ("gemma3", {"sliding_window": 4})], ids=str)
def test_a_batch_can_be_decoded_again(family: str, config: dict[str, Any]) -> None:
    """Plain, steered, scored and plain once more from one prefill: nothing of a run stays in the caches."""
    model, moves = tiny_model(family, **config), energy_moves()
    batch = prefilled(model, PROMPTS)
    plain = decode(model, batch, max_new_tokens=8, end_ids=END)
    with Steering(model, moves, window=2) as steering:
        first = decode(model, batch, max_new_tokens=8, end_ids=END, steering=steering)
        list(score(model, batch, [[1, 2, 3]] * 4, steering=steering))
        again = decode(model, batch, max_new_tokens=8, end_ids=END, steering=steering)
        beside = decode(model, batch, max_new_tokens=8, end_ids=END)  # plain, though something is attached
    after = decode(model, batch, max_new_tokens=8, end_ids=END)
    assert first.tokens == again.tokens != plain.tokens
    assert plain.tokens == beside.tokens == after.tokens
    assert torch.equal(plain.first_logits, after.first_logits)


def test_the_prompts_caches_do_not_depend_on_what_is_attached() -> None:
    """A prefill while steering is on is the plain model's; so is the shared prefix."""
    model = tiny_model()
    plain = prefilled(model, PROMPTS)
    with Steering(model, energy_moves(), window=2) as steering:
        steered = prefilled(model, PROMPTS)
        assert steering.enabled
    for a, b in zip(plain.cache.layers, steered.cache.layers, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "gpt_neox"])
def test_sharing_the_prefix_changes_nothing(family: str) -> None:
    model = tiny_model(family)
    apart = decode(model, prefilled(model, PROMPTS, shared=False), max_new_tokens=6, end_ids=END)
    shared = decode(model, prefilled(model, PROMPTS), max_new_tokens=6, end_ids=END)
    assert apart.tokens == shared.tokens
    torch.testing.assert_close(apart.first_logits, shared.first_logits, atol=1e-4, rtol=0)


def test_what_is_shared() -> None:
    model = tiny_model()
    shared = share_prefix(model, PROMPTS)
    assert shared.ids == PREFIX
    assert shared.cache.get_seq_length() == len(PREFIX)
    assert share_prefix(model, [[1, 2], [3, 4]]).cache is None
    assert share_prefix(model, [[1, 2, 3], [1, 2, 3]]).ids == [1, 2]  # each prompt keeps a token of its own
    assert share_prefix(model, [[1], [1, 2]]).cache is None


@pytest.mark.parametrize(("family", "config"), AWKWARD[:3], ids=str)
def test_sliding_windows_share_nothing(family: str, config: dict[str, Any]) -> None:
    assert share_prefix(tiny_model(family, **config), PROMPTS).cache is None


@pytest.mark.parametrize("prompts", [[[5]], [[5], [6]], [[5], [6, 7]], [[1, 2], [1, 2]]], ids=str)
def test_the_shortest_prompts(prompts: list[list[int]]) -> None:
    model, moves = tiny_model(), energy_moves()
    batch = prefilled(model, prompts)
    assert decode(model, batch, max_new_tokens=4, end_ids=END).tokens == by_generate(model, prompts, 4)
    with Steering(model, moves, window=1) as steering:
        found = decode(model, batch, max_new_tokens=4, end_ids=set(), steering=steering).tokens
    assert found == [slow_generate(model, moves, prompt, 4, 1, ends=()) for prompt in prompts]


def test_a_batch_of_some_of_the_prompts() -> None:
    model = tiny_model()
    batch = prefill(model, PROMPTS, [2, 0], share_prefix(model, PROMPTS))
    assert batch.rows == [2, 0]
    assert decode(model, batch, max_new_tokens=5, end_ids=END).tokens == by_generate(model, [PROMPTS[2], PROMPTS[0]], 5)


def test_strengths_follow_the_prompts_through_batches() -> None:
    model, moves, strengths = tiny_model(), energy_moves(), [0.0, 1.0, 0.5, 2.0]
    shared, found = share_prefix(model, PROMPTS), {}
    with Steering(model, moves, window=2, strength=torch.tensor(strengths)) as steering:
        for places in batches(PROMPTS, 3):
            batch = prefill(model, PROMPTS, places, shared)
            done = decode(
                model, batch, max_new_tokens=6, end_ids=set(), steering=steering,
                decided=lambda i, tokens: i == 0 and len(tokens) == 2,
            )  # fmt: skip
            found.update(zip(places, done.tokens, strict=True))
    for at, prompt in enumerate(PROMPTS):
        wanted = slow_generate(model, moves, prompt, 6, 2, strengths[at], ends=())
        assert found[at] == wanted[: len(found[at])]


@pytest.mark.parametrize(("family", "config"), [("qwen2", {}), ("gpt2", {}), *AWKWARD[:2]], ids=str)
@pytest.mark.parametrize("steered", [False, True])
def test_scores_are_the_logits_of_a_whole_forward_pass(family: str, config: dict[str, Any], steered: bool) -> None:
    model, moves = tiny_model(family, **config), energy_moves()
    answers = [[9, 8, 7, 6], [5], [4, 3], [2, 1, 0, 60, 61, 62]]
    batch = prefilled(model, PROMPTS)
    if steered:
        with Steering(model, moves, window=2) as steering:
            found = list(score(model, batch, answers, steering=steering))
    else:
        found = list(score(model, batch, answers))
    for prompt, answer, logits in zip(PROMPTS, answers, found, strict=True):
        wanted = slow_logits(model, moves if steered else {}, [*prompt, *answer], len(prompt) - 1, 2)
        torch.testing.assert_close(logits, wanted[len(prompt) - 1 : -1], atol=1e-4, rtol=0)


def test_scores_of_one_token_each() -> None:
    model = tiny_model()
    batch = prefilled(model, PROMPTS)
    found = torch.cat(list(score(model, batch, [[1], [2], [3], [4]])))
    torch.testing.assert_close(found, decode(model, batch, max_new_tokens=1, end_ids=END).first_logits)


def test_steered_scores_choose_the_tokens_that_were_decoded() -> None:
    model, moves = tiny_model(), energy_moves()
    batch = prefilled(model, PROMPTS)
    with Steering(model, moves, window=2) as steering:
        made = decode(model, batch, max_new_tokens=6, end_ids=set(), steering=steering)
        scored = list(score(model, batch, made.tokens, steering=steering))
    assert [logits.argmax(dim=-1).tolist() for logits in scored] == made.tokens
    torch.testing.assert_close(torch.stack([s[0] for s in scored]), made.first_logits, atol=1e-4, rtol=0)


def test_batches_hold_every_row_once_longest_first() -> None:
    rows = [[0] * n for n in (5, 1, 9, 3, 9, 2)]
    groups = list(batches(rows, 2))
    assert groups == [[2, 4], [0, 3], [5, 1]]
    assert sorted(place for group in batches(rows, 4, tokens=10) for place in group) == list(range(6))
    assert all(len(group) * len(rows[group[0]]) <= 10 for group in batches(rows, 4, tokens=10))
    assert list(batches([[0] * 99], 4, tokens=10)) == [[0]]  # too long for any batch: alone


def test_the_plain_model_is_put_back_as_it_was() -> None:
    model = tiny_model()
    with Steering(model, energy_moves(), window=2) as steering:
        with plain_model(model):
            assert not steering.enabled
        with pytest.raises(KeyError), plain_model(model):
            raise KeyError
        assert steering.enabled
        steering.disable()
        with plain_model(model):
            pass
        assert not steering.enabled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_whose_cache_is_mapped_from_a_file_decodes_alike(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model().to(dtype)
    batch = prefilled(model, PROMPTS)
    wanted = decode(model, batch, max_new_tokens=8, end_ids=END)
    stored = mapped(batch, tmp_path / "caches")
    assert not list(tmp_path.iterdir()), "the file has no name any more"
    keys = [layer.keys for layer in stored.cache.layers]
    assert len({one.untyped_storage().data_ptr() for one in keys}) == 1
    before = [one.clone() for one in keys]
    for _ in range(2):
        made = decode(model, stored, max_new_tokens=8, end_ids=END)
        assert (made.tokens, made.ended) == (wanted.tokens, wanted.ended)
        assert torch.equal(made.first_logits, wanted.first_logits)
    assert all(torch.equal(one, old) for one, old in zip(keys, before, strict=True))
    model.requires_grad_(True)
    first_logits(model, stored).sum().backward()  # training through the model needs normal tensors


def test_rows_are_scored_in_parts_as_together() -> None:
    model = tiny_model()
    batch, answers = prefilled(model, PROMPTS), [[1, 2, 3], [4], [5, 6], [7, 8]]
    with Steering(model, energy_moves(), window=2, strength=torch.tensor([0.5, 1.0, 0.0, 2.0])) as steering:
        together = list(score(model, batch, answers, steering=steering))
        parts = list(score(model, batch, answers, steering=steering, most_bytes=2 * 3 * 4 * VOCABULARY))
        single = list(score(model, batch, answers, steering=steering, most_bytes=1))
    for at, one in enumerate(together):
        torch.testing.assert_close(parts[at], one, atol=1e-5, rtol=0)
        torch.testing.assert_close(single[at], one, atol=1e-5, rtol=0)


def test_a_model_that_keeps_more_than_keys_and_values_is_refused() -> None:
    """Rows cannot be taken out of what a layer of convolutions or of linear attention keeps."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Lfm2Config(**sizes, num_hidden_layers=4, vocab_size=320, full_attn_idxs=[1, 3], conv_L_cache=3)
    model = Lfm2ForCausalLM(config).eval()
    with pytest.raises(ModelError, match="Lfm2ForCausalLM keeps states beside keys and values"):
        prefill(model, [[5, 9, 33], [40, 41]], [0, 1], share_prefix(model, [[5, 9, 33], [40, 41]]))
