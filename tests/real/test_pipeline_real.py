"""A small fit of the default model, end to end: that everything fits together, not how much it helps."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elsteer.demo import MODEL, fast_dtype
from elsteer.errors import NothingHelps
from elsteer.evaluation.evaluate import Evaluation, evaluate
from elsteer.fitting import fit
from elsteer.landscape import Landscape
from elsteer.models import encode_chat, left_pad, load
from elsteer.prompts import Prompt, load_starter, sample
from elsteer.settings import FitSettings
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
    assert {row["prompt_id"] for row in rows_of(run_dir / "completions.jsonl")} == {prompt.id for prompt in TRAIN}
    assert {row["prompt_id"] for row in rows_of(run_dir / "dev.jsonl")} == {prompt.id for prompt in DEV}
    assert {row["label"] for row in rows_of(run_dir / "completions.jsonl")} >= {"refusal", "compliance"}
    assert rows_of(run_dir / "frontier.jsonl")
    assert (run_dir / "frontier.png").exists()
    assert landscape.fingerprint.name == MODEL
    assert (landscape.fingerprint.num_layers, landscape.fingerprint.hidden_size) == (24, 896)
    assert landscape.rule.layers == tuple(range(12, 22))  # trained through the model, so they steer together
    assert all("length" in tensors for tensors in landscape.tensors.values())
    assert len(TRAIN) / 2 < sum(landscape.provenance["outcomes"].values()) <= len(TRAIN)


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
