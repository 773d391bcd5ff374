"""A small fit of the default model, end to end: that everything fits together, not how much it helps."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elsteer.completions import PromptCaches, complete
from elsteer.demo import MODEL, fast_dtype
from elsteer.energy.train import auroc
from elsteer.errors import NothingHelps
from elsteer.evaluation.evaluate import Evaluation, evaluate
from elsteer.fitting import fit
from elsteer.judges import RulesJudge
from elsteer.landscape import Landscape
from elsteer.models import decoder_blocks, encode_chat, left_pad, linear, load
from elsteer.prompts import Prompt, load_starter, sample
from elsteer.settings import FitSettings
from elsteer.states import StateStore
from elsteer.training import shuffled_control
from pipelines import forward_passes, lines

pytestmark = pytest.mark.real

Real = tuple[PreTrainedModel, PreTrainedTokenizerBase]
SUITE_ROWS = 16
# Two states of each prompt, since 60 prompts hold few false refusals; a grid of one setting, and no constraint that could
# refuse it.
SETTINGS = FitSettings.model_validate(
    {
        "collect": {"batch_size": 16, "max_new_tokens": 24, "state_tokens": 2},
        "training": {"refine_epochs": 1, "benign_weights": [2.5]},
        "tuning": {
            "etas": [0.12],
            "steps": [1],
            "windows": [0],
            "gates": [None],
            "guards": [True],
            "bands": 1,
            "finalists": 1,
            "tokens": 16,
            "safety_margin": -1,
            "safety_weighted": -1,
            "worst_source": -1,
            "perplexity_ratio": 1e6,
            "kl": 1e6,
            "quality_prompts": 4,
            "quality_tokens": 12,
            "neutral_prompts": 2,
        },
    }
)


def drawn(split: str, sounding: int, plain: int, harmful: int) -> list[Prompt]:
    """Starter prompts of each kind, by seed; of the closest twins the model refuses too few to learn from 60 prompts."""
    every = [one for one in load_starter(split) if not one.family.startswith("twins/")]
    kinds = {
        sounding: [one for one in every if not one.harmful and one.category != "plain"],
        plain: [one for one in every if one.category == "plain"],
        harmful: [one for one in every if one.harmful],
    }
    return [one for count, prompts in kinds.items() if count for one in sample(prompts, count, seed=0)]


TRAIN, DEV = drawn("train", 36, 0, 24), drawn("dev", 22, 4, 14)


@pytest.fixture(scope="module")
def fast() -> Real:
    """The default model in the dtype that the demo takes."""
    return load(MODEL, dtype=fast_dtype(), device="cpu")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real") / "run"


def fitted(fast: Real, folder: Path) -> Landscape:
    """The landscape in the run folder; whether so small a grid helps is of no account."""
    with contextlib.suppress(NothingHelps):
        fit(*fast, TRAIN, dev=DEV, run_dir=folder, settings=SETTINGS)
    return Landscape.from_pretrained(folder / "landscape").with_rule(strength=1.0)


@pytest.fixture(scope="module")
def landscape(fast: Real, run_dir: Path) -> Landscape:
    return fitted(fast, run_dir)


@pytest.fixture(scope="module")
def evaluation(fast: Real, run_dir: Path, landscape: Landscape) -> Evaluation:
    return evaluate(
        *fast,
        ["none", landscape],
        ["starter"],
        run_dir=run_dir,
        limit=SUITE_ROWS,
        max_new_tokens=24,
        quality_prompts=4,
        quality_tokens=12,
    )


def chats(tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt]) -> list[list[int]]:
    return [encode_chat(tokenizer, list(prompt.messages)) for prompt in prompts]


def first_logits(real: Real, rows: list[list[int]]) -> torch.Tensor:
    """(B, vocabulary) logits of the first generated token."""
    model, tokenizer = real
    ids, mask = left_pad(rows, tokenizer.pad_token_id)
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=1,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.logits[0].float()


def rows_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in lines(path)]


def test_the_run_folder_is_whole(landscape: Landscape, run_dir: Path) -> None:
    for name, split, given in (("completions", "train", TRAIN), ("dev", "dev", DEV)):
        rows = [row for row in rows_of(run_dir / "prompts.jsonl") if row["split"] == split]
        assert {row["id"] for row in rows if "+" not in row["source"]} == {prompt.id for prompt in given}
        assert {row["id"] for row in rows} == {row["prompt_id"] for row in rows_of(run_dir / f"{name}.jsonl")}
        assert any("+" in row["source"] for row in rows), "some are under attack"
    assert {row["label"] for row in rows_of(run_dir / "completions.jsonl")} >= {"refusal", "compliance"}
    assert rows_of(run_dir / "frontier.jsonl")
    assert (run_dir / "frontier.png").exists()
    assert landscape.fingerprint.name == MODEL
    assert (landscape.fingerprint.num_layers, landscape.fingerprint.hidden_size) == (24, 896)
    assert landscape.rule.layers == tuple(range(12, 22))  # trained through the model, so they steer together
    assert all("length" in tensors for tensors in landscape.tensors.values())
    assert len(TRAIN) / 2 < sum(landscape.provenance["outcomes"].values()) <= 1.08 * len(TRAIN)


def test_fitted_again_nothing_is_computed_anew(fast: Real, landscape: Landscape, run_dir: Path) -> None:
    with forward_passes(fast[0]) as passes:
        again = fitted(fast, run_dir)
    assert passes == []
    assert again.rule == landscape.rule
    for layer in landscape.rule.layers:
        assert torch.equal(again.tensors[layer]["weight"], landscape.tensors[layer]["weight"])


def test_strength_0_is_the_plain_model_bit_for_bit(fast: Real, landscape: Landscape) -> None:
    model, tokenizer = fast
    ids, mask = left_pad(chats(tokenizer, DEV[:3]), tokenizer.pad_token_id)

    def answers() -> tuple[torch.Tensor, torch.Tensor]:
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=12,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return out.sequences, torch.stack(out.logits)

    tokens, logits = answers()
    with landscape.attach(model, 0.0, tokenizer=tokenizer):
        same = answers()
    assert torch.equal(tokens, same[0])
    assert torch.equal(logits, same[1])


def test_the_landscape_changes_what_comes_after_the_prompt(fast: Real, landscape: Landscape) -> None:
    rows = chats(fast[1], DEV[:3])
    plain = first_logits(fast, rows)
    with landscape.attach(fast[0], 1.0, tokenizer=fast[1]):
        steered = first_logits(fast, rows)
    assert torch.isfinite(steered).all()
    assert bool(((steered - plain).abs().amax(dim=-1) > 0.05).all())
    assert torch.equal(first_logits(fast, rows), plain)  # and leaves nothing behind


def test_saved_and_loaded_it_steers_the_same(fast: Real, landscape: Landscape, tmp_path: Path) -> None:
    rows = chats(fast[1], DEV[:2])
    with landscape.attach(fast[0], 1.0):
        before = first_logits(fast, rows)
    landscape.save_pretrained(tmp_path / "copy")
    with Landscape.from_pretrained(tmp_path / "copy").attach(fast[0], 1.0, tokenizer=fast[1]):
        assert torch.equal(first_logits(fast, rows), before)


def test_a_batch_equals_its_rows_alone(real: Real, landscape: Landscape) -> None:
    """In float32, whatever dtype it was fitted in."""
    rows = chats(real[1], sorted(DEV, key=lambda one: len(one.text))[:: len(DEV) // 4])
    assert len({len(row) for row in rows}) > 1
    with landscape.attach(real[0], 1.0, tokenizer=real[1]):
        together = first_logits(real, rows)
        alone = torch.cat([first_logits(real, [row]) for row in rows])
    assert float((together - alone).abs().max()) < 1e-4 * float(alone.abs().max())


@contextlib.contextmanager
def steered_by_autograd(model: PreTrainedModel, landscape: Landscape) -> Iterator[None]:
    """Steering once more as its text says it: gradients of the energy on the state itself, the prompt's last token alone."""
    rule, handles = landscape.rule, []
    dues: list[torch.Tensor] = []  # of the steered blocks so far
    values: dict[int, torch.Tensor] = {}  # by block, (tokens, numbers) of this pass

    def watch(at: int) -> Any:
        return lambda _module, _args, output: values.__setitem__(at, output[0].detach())

    def context(named: dict[str, torch.Tensor]) -> torch.Tensor:
        first, stop = named["context_blocks"].int().tolist()
        tokens = torch.cat([values[at][:-1] for at in range(first, stop)], dim=1).float()
        rows = [
            torch.softmax(tokens @ query, dim=0) @ tokens - named["context_mean"] for query in named["context_query"]
        ]
        return torch.cat(rows)

    def hook(layer: int) -> Any:
        named, guard = landscape.tensors[layer], landscape.guards[layer]
        a, c, units, d = named["weight"][0], named["weight"][1], named["weight"][2:-1], named["weight"][-1]

        def steer(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = (args[0] if args else kwargs["hidden_states"]).clone()
            if hidden.shape[1] == 1:
                return None  # a generated token
            with torch.inference_mode(False), torch.enable_grad():
                state = hidden[0, -1].detach().clone()
                read = named["context_weight"].flatten(1) @ context(named)
                length = rule.eta * float(named["length"]) * float(named["scale"]) * len(state) ** 0.5
                for _ in range(rule.steps):
                    state = state.detach().requires_grad_()
                    x = (state - named["mean"]) / named["scale"]
                    due = a @ x + named["bias"][0] + read[0]
                    due = due + named["bend"] @ torch.nn.functional.silu(units @ x + named["bias"][2:-1] + read[2:-1])
                    v = c @ x + named["bias"][1]
                    (slope,) = torch.autograd.grad(v, state)
                    slope = slope - guard @ (guard.T @ slope)  # of v; u and r are held: E's is -tanh(u) g times that
                    if layer == rule.layers[0]:
                        dues.clear()
                    dues.append(due.detach())
                    way = torch.tanh(torch.stack(dues).mean())
                    need = 2 / (1 + torch.exp(named["sharpness"] * way * (d @ x + named["bias"][-1]).detach()))
                    state = state + length * way * need * slope / slope.norm()
            hidden[0, -1] = state.detach()
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return steer

    for at in range(rule.layers[0]):
        handles.append(decoder_blocks(model)[at].self_attn.v_proj.register_forward_hook(watch(at)))
    for layer in rule.layers:
        handles.append(decoder_blocks(model)[layer].register_forward_pre_hook(hook(layer), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_fast_and_plain_paths_agree(
    real: Real, landscape: Landscape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verdicts, states and AUROC of everything that makes it fast, against prompt after prompt without any of it.

    Fast: one prefix for all, batches by length, answers stopped once the verdict is sure, states from the same pass, turned
    linear layers, caches in files and used again, the closed form. Plain: `generate`, a second pass for the states, autograd.
    """
    model, tokenizer = real
    prompts, tokens, judge = [one for one in DEV if one.category != "plain"][16:28], 12, RulesJudge()
    harmful = torch.tensor([one.harmful for one in prompts])
    assert 3 < int(harmful.sum()) < 9
    caches = PromptCaches(model, tokenizer, prompts, batch_size=8, folder=tmp_path)
    store = StateStore(tmp_path / "states")
    plain = complete(caches, judge, max_new_tokens=tokens, path=tmp_path / "plain.jsonl", states=store)
    with landscape.attach(model, tokenizer=tokenizer) as steering:
        steered = complete(caches, judge, max_new_tokens=tokens, steering=steering)
    states = store.read([one.id for one in prompts])[0][:, 0]

    monkeypatch.setattr(linear, "MOST_ROWS", 0)
    monkeypatch.setattr(linear, "MOST_ROWS_WIDE", 0)

    def answer(ids: list[int]) -> str:
        out = model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)[0, len(ids) :]
        return str(tokenizer.decode(out, skip_special_tokens=True)).strip()

    rows, slow = chats(tokenizer, prompts), []
    for ids in rows:
        with torch.inference_mode():
            slow.append(torch.stack(model(torch.tensor([ids]), output_hidden_states=True).hidden_states[:-1])[:, 0, -1])
    for fast_ones, way in ((plain, contextlib.nullcontext()), (steered, steered_by_autograd(model, landscape))):
        with way:
            wanted = [judge.judge(one.text, answer(ids)).label for one, ids in zip(prompts, rows, strict=True)]
        assert [one.label for one in fast_ones] == wanted
    assert {one.label for one in plain} >= {"refusal", "compliance"}  # 12 tokens may only repeat the question
    assert [one.label for one in plain] != [one.label for one in steered] or landscape.rule.strength == 0
    refused = torch.tensor([one.label == "refusal" for one in plain])
    for layer in landscape.rule.layers:
        exact = torch.stack(slow)[:, layer]
        assert float((states[:, layer] - exact).norm() / exact.norm()) < 1e-4
        for kind in (harmful, ~harmful):
            found = [
                auroc(landscape.energy(layer, of[kind])[:, None], refused[kind]) for of in (states[:, layer], exact)
            ]
            torch.testing.assert_close(*found, atol=0, rtol=0, equal_nan=True)


def test_evaluation_rows_are_complete_and_paired(evaluation: Evaluation, run_dir: Path) -> None:
    by_method = {name: [r for r in evaluation.rows if r["method"] == name] for name in ("none", "els")}
    for name, rows in by_method.items():
        assert len(rows) == SUITE_ROWS
        on_disk = {row["prompt_id"]: row["text"] for row in rows_of(run_dir / f"evaluation/starter.{name}.jsonl")}
        assert {row["prompt_id"]: row["text"] for row in rows} == on_disk
    assert [row["prompt_id"] for row in by_method["none"]] == [row["prompt_id"] for row in by_method["els"]]
    assert sum(one.pairs for one in evaluation.comparisons()["total"]) == SUITE_ROWS
    json.loads((run_dir / "evaluation/summary.json").read_text(), parse_constant=pytest.fail)
    assert evaluation.quality is not None
    assert evaluation.quality.perplexity_ratio > 0


def test_the_report_is_there(evaluation: Evaluation) -> None:
    page = evaluation.report.read_text(encoding="utf-8")
    assert MODEL in page
    assert page.count("data:image/png;base64,") >= 2


def test_the_shuffled_control_steers_elsewhere(fast: Real, landscape: Landscape, run_dir: Path) -> None:
    control = shuffled_control(run_dir, landscape)
    assert control.rule == landscape.rule
    rows = chats(fast[1], DEV[:2])
    with landscape.attach(fast[0], 1.0):
        ours = first_logits(fast, rows)
    with control.attach(fast[0], 1.0):
        assert not torch.equal(first_logits(fast, rows), ours)
