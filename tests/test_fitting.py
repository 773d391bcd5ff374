"""`fit`: from prompts to a landscape in a run folder, whatever happens on the way."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import PreTrainedModel

from elsteer.comparison.compare import finished_fit
from elsteer.energy.refine import SteeredProducts
from elsteer.errors import JudgeError, LandscapeError, NothingHelps, PromptError, RunError, SteeringError
from elsteer.fitting import check_model, collect, fit
from elsteer.judges import JUDGES, Verdict
from elsteer.landscape import Landscape
from elsteer.models import encode_chat, fingerprint, left_pad
from elsteer.prompts import Prompt
from elsteer.run import RunFolder, key_of
from elsteer.settings import FitSettings
from elsteer.states import StateStore
from elsteer.training import Energies, read_energies, save_energies, shuffled, shuffled_control
from landscapes import same_landscape, thoughtless, tiny_landscape
from pipelines import (
    Killed,
    LetterJudge,
    Tiny,
    dies_at,
    forward_passes,
    lines,
    said,
    some_prompts,
    speaker,
    tiny_settings,
)
from tiny import tiny_tokenizer

TRAIN, DEV = some_prompts(80), some_prompts(48, start=200)
NEUTRAL = [Prompt.of(text, False) for text in ("What is the time?", "Tell me of the sea.")]
HELPS = {"etas": [0.3, 0.9, 2.0]}


@pytest.fixture(autouse=True)
def _letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(JUDGES, "letters", LetterJudge)


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return speaker()


def fitted(tiny: Tiny, folder: Path, **options: Any) -> Landscape:
    given = {"dev": DEV, "neutral": NEUTRAL, "settings": tiny_settings(tuning=HELPS), **options}
    return fit(*tiny, given.pop("prompts", TRAIN), run_dir=folder, **given)


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Landscape, Path]:
    """An uninterrupted fit; leave its folder as it is."""
    folder = tmp_path_factory.mktemp("whole")
    JUDGES["letters"] = LetterJudge
    try:
        return fitted(tiny, folder), folder
    finally:
        del JUDGES["letters"]


def rows_of(path: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{path} holds {word}, which is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in lines(path)]


def logits(tiny: Tiny) -> torch.Tensor:
    chats = [encode_chat(tiny[1], list(prompt.messages)) for prompt in DEV[:4]]
    ids, mask = left_pad(chats, tiny[1].pad_token_id)
    with torch.inference_mode():
        return tiny[0](input_ids=ids, attention_mask=mask).logits[:, -1]


def core(landscape: Landscape) -> dict[str, Any]:
    """All of the provenance but the time."""
    return {name: value for name, value in landscape.provenance.items() if name != "created"}


def same_result(one: Path, other: Path) -> None:
    a, b = (Landscape.from_pretrained(folder / "landscape") for folder in (one, other))
    assert core(a) == core(b)
    b.provenance = a.provenance
    same_landscape(a, b)


# What it leaves behind


def test_it_writes_the_run_folder(whole: tuple[Landscape, Path]) -> None:
    found, folder = whole
    expected = {"settings.yaml", "prompts.jsonl", "completions.jsonl", "states", "energy", "dev.jsonl", "dev_states"}
    expected |= {"frontier.jsonl", "frontier.png", "landscape", "stages.json", "model.json"}
    assert expected == {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert FitSettings.model_validate(yaml.safe_load((folder / "settings.yaml").read_text())) == tiny_settings(
        tuning=HELPS
    )
    prompts = rows_of(folder / "prompts.jsonl")
    assert [row["id"] for row in prompts if row["split"] == "train"] == [prompt.id for prompt in TRAIN]
    assert [row["id"] for row in prompts if row["split"] == "dev"] == [prompt.id for prompt in DEV]
    assert [row["id"] for row in prompts if row["split"] == "neutral"] == [prompt.id for prompt in NEUTRAL]
    assert sorted(row["prompt_id"] for row in rows_of(folder / "completions.jsonl")) == sorted(p.id for p in TRAIN)
    assert sorted(row["prompt_id"] for row in rows_of(folder / "dev.jsonl")) == sorted(p.id for p in DEV)
    assert (folder / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert set(json.loads((folder / "stages.json").read_text())) == {"inputs", "collect", "energy", "tune"}
    assert sum(found.provenance["outcomes"].values()) == len(TRAIN)
    assert found.provenance["dev"]["prompts"] == len(DEV)
    assert found.provenance["dev"]["benign"] == len(DEV) // 2
    assert found.provenance["judge"] == "letters"


def test_the_energies_learned_what_refuses_and_steering_removes_false_refusals(whole: tuple[Landscape, Path]) -> None:
    found, _ = whole
    dev = found.provenance["dev"]
    assert max(one["benign"] for one in found.provenance["auroc"].values()) > 0.7
    assert dev["answered_benign"] > dev["plain_answered"], dev
    assert found.rule.strength == 1.0


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma2", "gpt2", "gpt_neox", "falcon"])
def test_fitted_saved_and_loaded_it_steers_to_the_same_logits(family: str, tmp_path: Path) -> None:
    tiny = speaker(family)
    try:
        found = fitted(tiny, tmp_path)
    except NothingHelps:  # a random model of some families cannot be helped: the landscape is there all the same
        found = Landscape.from_pretrained(tmp_path / "landscape")
        assert found.rule.strength == 0
    plain = logits(tiny)
    with found.attach(tiny[0], 1.0):
        steered = logits(tiny)
    assert not torch.equal(steered, plain)
    found.save_pretrained(tmp_path / "copy")
    for place in ("landscape", "copy"):
        loaded = Landscape.from_pretrained(tmp_path / place)
        with loaded.attach(tiny[0], 1.0, tokenizer=tiny[1]):
            assert torch.equal(logits(tiny), steered)
        with loaded.attach(tiny[0], 0.0):
            assert torch.equal(logits(tiny), plain)
    assert torch.equal(logits(tiny), plain)


def test_a_model_in_bfloat16_is_fitted_too(tmp_path: Path) -> None:
    """There the last token's embedding is the same for all prompts to the bit, so the first layer has no harm direction."""
    model, tokenizer = speaker()
    with contextlib.suppress(NothingHelps):
        fitted((model.bfloat16(), tokenizer), tmp_path, settings=tiny_settings(tuning={**HELPS, "band_share": 1.0}))
    found = Landscape.from_pretrained(tmp_path / "landscape")
    assert found.rule.layers == (0, 1, 2, 3)
    assert found.guards[0].shape == (32, 0)
    with found.attach(model, 1.0):
        assert torch.isfinite(logits((model, tokenizer))).all()


def test_the_same_seed_gives_the_same_landscape(tiny: Tiny, whole: tuple[Landscape, Path], tmp_path: Path) -> None:
    torch.manual_seed(123)
    fitted(tiny, tmp_path / "again")
    same_result(tmp_path / "again", whole[1])


@pytest.mark.parametrize(("energy", "differ"), [("product", False), ("network", True)])
def test_the_seed_decides_about_networks_and_not_about_the_product(
    energy: str, differ: bool, tiny: Tiny, tmp_path: Path
) -> None:
    found = []
    for seed in (0, 1):
        settings = tiny_settings(seed=seed, tuning=HELPS)
        settings = settings.model_copy(
            update={"training": settings.training.model_copy(update={"energy": energy, "epochs": 2})}
        )
        with contextlib.suppress(NothingHelps):
            fitted(tiny, tmp_path / str(seed), settings=settings)
        found.append(Landscape.from_pretrained(tmp_path / str(seed) / "landscape"))
    layer = next(layer for layer in found[0].rule.layers if layer in found[1].rule.layers)
    weights = [one.tensors[layer]["weight"] for one in found]
    assert torch.equal(*weights) is not differ


# Killed and gone on with

STAGES = [
    "answering the training prompts",
    "training the energy models",
    "answering the dev prompts",
    "screening settings",
    "judging a setting",
    "checking the answers",
]


@pytest.mark.parametrize("stage", STAGES)
def test_killed_in_any_stage_it_goes_on_without_losing_a_row(
    stage: str, tiny: Tiny, whole: tuple[Landscape, Path], tmp_path: Path
) -> None:
    plain = logits(tiny)
    with pytest.raises(Killed):
        fitted(tiny, tmp_path, progress=dies_at(stage, 3))
    assert torch.equal(logits(tiny), plain)  # nothing stays attached
    logs = ("completions.jsonl", "dev.jsonl", "frontier.jsonl")
    before = {name: lines(tmp_path / name) for name in logs}
    assert any(before.values())
    energies = tmp_path / "energy/1/energies.safetensors"
    trained = energies.stat().st_mtime_ns if energies.exists() else None
    fitted(tiny, tmp_path)
    for name in logs:
        after = lines(tmp_path / name)
        assert after[: len(before[name])] == before[name]
        assert len(set(after)) == len(after) == len(lines(whole[1] / name))
    if trained is not None:
        assert energies.stat().st_mtime_ns == trained
    same_result(tmp_path, whole[1])


def test_done_already_it_computes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    fitted(tiny, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.suffix in (".jsonl", ".safetensors")}
    with forward_passes(tiny[0]) as passes:
        fitted(tiny, tmp_path)
    assert passes == []
    assert {path: path.read_bytes() for path in before} == before


def test_a_prompt_more_is_answered_alone(tiny: Tiny, tmp_path: Path) -> None:
    fitted(tiny, tmp_path)
    before = lines(tmp_path / "completions.jsonl")
    fresh = some_prompts(2, start=500)
    with contextlib.suppress(NothingHelps):
        fitted(tiny, tmp_path, prompts=TRAIN + fresh)
    after = lines(tmp_path / "completions.jsonl")
    assert after[: len(before)] == before
    assert {json.loads(line)["prompt_id"] for line in after[len(before) :]} == {prompt.id for prompt in fresh}


# Trained through the model

THROUGH = tiny_settings(tuning=HELPS, training={"refine_epochs": 2, "refine_band": [0.25, 0.75], "context_blocks": 4})


def test_energies_trained_through_the_model_steer_together(tiny: Tiny, tmp_path: Path) -> None:
    plain = logits(tiny)
    weights = {name: tensor.clone() for name, tensor in tiny[0].state_dict().items()}
    with contextlib.suppress(NothingHelps):
        fitted(tiny, tmp_path, settings=THROUGH)
    found = Landscape.from_pretrained(tmp_path / "landscape")
    assert found.rule.layers == (1, 2)
    assert all(float(found.tensors[layer]["length"]) > 0 for layer in found.rule.layers)
    assert all(found.tensors[layer]["context_blocks"].tolist() == [0, 1] for layer in found.rule.layers)
    assert {tuple(row["trial"]["rule"]["layers"]) for row in rows_of(tmp_path / "frontier.jsonl")} == {(1, 2)}
    with found.attach(tiny[0], 1.0):
        assert not torch.equal(logits(tiny), plain)
    assert torch.equal(logits(tiny), plain)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in tiny[0].state_dict().items())
    with forward_passes(tiny[0]) as passes, contextlib.suppress(NothingHelps):
        fitted(tiny, tmp_path, settings=THROUGH)
    assert passes == []


def through(tiny: Tiny, folder: Path, settings: FitSettings = THROUGH, **options: Any) -> Landscape:
    with contextlib.suppress(NothingHelps):
        fitted(tiny, folder, settings=settings, **options)
    return Landscape.from_pretrained(folder / "landscape")


def changed_training(**changed: Any) -> FitSettings:
    return THROUGH.model_copy(update={"training": THROUGH.training.model_copy(update=changed)})


def test_a_fit_goes_on_from_a_landscape(tiny: Tiny, tmp_path: Path) -> None:
    """What u is read from stays, up to the weight's offset; the steps' direction and length are trained on."""
    start = through(tiny, tmp_path / "first")
    weight = start.provenance["dev"]["rule"]["benign_weight"]
    settings = changed_training(benign_weights=(weight,))
    found = through(tiny, tmp_path / "second", settings=settings, start=start, prompts=TRAIN[:60])
    assert found.provenance["start"]["digest"] == start.digest()
    assert found.rule.layers == start.rule.layers
    for layer in start.rule.layers:
        one, other = start.tensors[layer], found.tensors[layer]
        for name in ("mean", "scale", "bend", "context_query", "context_mean"):
            torch.testing.assert_close(other[name], one[name], msg=name)
        torch.testing.assert_close(other["weight"][0], one["weight"][0])
        torch.testing.assert_close(other["context_weight"], one["context_weight"])
        assert not torch.equal(other["weight"][1], one["weight"][1])
        assert not torch.equal(other["length"], one["length"])
    again = through(tiny, tmp_path / "second", settings=settings, start=start, prompts=TRAIN[:60])
    assert (again.digest(), core(again)) == (found.digest(), core(found))
    anew = through(tiny, tmp_path / "second", settings=settings, prompts=TRAIN[:60])
    assert not torch.equal(anew.tensors[start.rule.layers[0]]["weight"][0], one["weight"][0])


def test_u_is_shifted_by_the_weight_and_then_multiplied_by_its_gain(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, float, float]] = []
    weigh, times = SteeredProducts.weigh, SteeredProducts.times
    monkeypatch.setattr(
        SteeredProducts,
        "weigh",
        lambda self, ratio, gain=1.0: told.append(("weigh", ratio, gain)) or weigh(self, ratio, gain),
    )
    monkeypatch.setattr(
        SteeredProducts, "times", lambda self, gain: told.append(("times", gain, 1)) or times(self, gain)
    )
    settings = changed_training(benign_weights=(3.0,))
    start = through(tiny, tmp_path / "first", settings=settings)
    gain = settings.training.refine_gain
    assert told == [("weigh", 3.0, 1.0), ("times", gain, 1)]
    told.clear()
    through(
        tiny, tmp_path / "second", settings=changed_training(benign_weights=(6.0,)), start=start, prompts=TRAIN[:60]
    )
    assert told == [("weigh", 2.0, gain)]


def test_a_landscape_without_pooled_steps_is_gone_on_with(tiny: Tiny, tmp_path: Path) -> None:
    settings = changed_training(refine_pooled=False)
    start = through(tiny, tmp_path / "first", settings=settings)
    found = through(tiny, tmp_path / "second", settings=settings, start=start, prompts=TRAIN[:60])
    assert found.provenance["start"]["digest"] == start.digest()
    assert not any("pooled" in tensors for tensors in found.tensors.values())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"refine_band": [0.5, 0.75]}, "--training-refine-band"),
        ({"context_blocks": 0}, "--training-context-blocks"),
        ({"refine_gain": 3.0}, "--training-refine-gain 2"),
        ({"refine_units": 5}, "--training-refine-units"),
        ({"refine_pooled": False}, "set --training-refine-pooled"),
        ({"refine_epochs": 0}, "--start"),
    ],
)
def test_a_fit_that_cannot_go_on_from_a_landscape_says_why(
    changed: dict[str, Any], words: str, tiny: Tiny, tmp_path: Path
) -> None:
    start = through(tiny, tmp_path / "first")
    with pytest.raises(RunError, match=words):
        fitted(tiny, tmp_path / "second", settings=changed_training(**changed), start=start)
    assert not (tmp_path / "second").exists()


def test_a_steered_model_is_neither_fitted_nor_answered_for_others(tiny: Tiny, tmp_path: Path) -> None:
    landscape = tiny_landscape(tiny[0])
    given = {"run_dir": tmp_path / "run", "settings": tiny_settings()}
    with landscape.attach(tiny[0], 0.0):
        with pytest.raises(SteeringError, match="steered already"):
            fit(*tiny, some_prompts(8), **given)
        with pytest.raises(SteeringError, match="steered already"):
            collect(*tiny, some_prompts(8), landscape, **given)
    assert not list((tmp_path / "run").glob("*.jsonl")), "before anything is answered"


def test_a_landscape_that_was_not_trained_through_the_model_or_is_of_another_is_no_start(
    tiny: Tiny, whole: tuple[Landscape, Path], tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="--start"):
        fitted(tiny, tmp_path, settings=THROUGH, start=whole[0])
    start = through(tiny, tmp_path / "first")
    with pytest.raises(LandscapeError):
        fitted(speaker(seed=1), tmp_path / "second", settings=THROUGH, start=start)
    start.provenance = {}
    with pytest.raises(RunError, match="--start"):
        fitted(tiny, tmp_path / "third", settings=THROUGH, start=start)
    assert not (tmp_path / "third").exists()


def test_where_a_stage_is_done_anew_and_killed_no_landscape_of_before_stands_for_it(tiny: Tiny, tmp_path: Path) -> None:
    settings = tiny_settings(tuning=HELPS)
    with contextlib.suppress(NothingHelps):
        fitted(tiny, tmp_path, settings=settings)
    assert (tmp_path / "landscape").is_dir()
    other = settings.model_copy(update={"training": settings.training.model_copy(update={"ridge": 0.5})})
    with pytest.raises(Killed):
        fitted(tiny, tmp_path, settings=other, progress=dies_at("training the energy models", 1))
    with pytest.raises(RunError, match="holds no finished fit"):
        finished_fit(tmp_path)


@pytest.mark.parametrize("changed", ["settings", "prompts"])
def test_changed_and_stopped_before_any_stage_is_done_anew_it_leaves_no_result_of_before(
    changed: str, tiny: Tiny, tmp_path: Path
) -> None:
    """Beside the settings and prompts of now, a landscape of those before would pass for theirs."""
    with contextlib.suppress(NothingHelps):
        fitted(tiny, tmp_path)
    result = [tmp_path / "landscape", tmp_path / "frontier.png"]
    settings = tiny_settings(tuning=HELPS)
    stop = dies_at("answering the training prompts", 1)
    with pytest.raises(Killed):
        fitted(tiny, tmp_path, progress=stop)
    assert all(path.exists() for path in result), "nothing has changed"
    training = settings.training.model_copy(update={"ridge": 0.5})
    options = {
        "settings": {"settings": settings.model_copy(update={"training": training})},
        "prompts": {"prompts": TRAIN[:-1]},
    }
    with pytest.raises(Killed):
        fitted(tiny, tmp_path, progress=dies_at("answering the training prompts", 1), **options[changed])
    assert not any(path.exists() for path in result)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b"null"])
def test_a_damaged_model_json_is_told(damage: bytes, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_bytes(damage)
    with pytest.raises(RunError, match=r"model\.json is damaged: delete it"):
        check_model(tmp_path, *tiny, tiny_settings())


@pytest.mark.parametrize("name", ["num_layers", "weights"])
def test_a_model_json_with_other_kinds_of_entries_is_told(name: str, tiny: Tiny, tmp_path: Path) -> None:
    told = fingerprint(*tiny).to_dict()
    (tmp_path / "model.json").write_text(json.dumps(told))
    check_model(tmp_path, *tiny, tiny_settings())
    told[name] = {key: ["x"] * 8 for key in told["weights"]} if name == "weights" else {}
    (tmp_path / "model.json").write_text(json.dumps(told))
    with pytest.raises(RunError, match=r"is damaged: delete it|another model"):
        check_model(tmp_path, *tiny, tiny_settings())


def test_settings_of_another_version_are_told_in_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    for words in ("collect: {no_such_setting: 1}", "seed: [", "", "- a list", "seed: 2024-02-30", "[" * 5000):
        file.write_text(words, encoding="utf-8")
        with pytest.raises(RunError, match="does not hold settings"):
            FitSettings.read(file)


def test_energies_that_read_no_context(tiny: Tiny, tmp_path: Path) -> None:
    settings = tiny_settings(tuning=HELPS, training={**THROUGH.training.model_dump(), "context_blocks": 0})
    with contextlib.suppress(NothingHelps):
        fitted(tiny, tmp_path, settings=settings)
    found = Landscape.from_pretrained(tmp_path / "landscape")
    assert not any(name.startswith("context") for tensors in found.tensors.values() for name in tensors)


def test_a_gate_on_energies_that_read_the_context_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    settings = tiny_settings(tuning={**HELPS, "gates": [0.25]}, training=THROUGH.training.model_dump())
    with pytest.raises(RunError, match="--training-context-blocks 0"):
        fitted(tiny, tmp_path / "run", settings=settings)
    assert not (tmp_path / "run").exists(), "said before a prompt is answered"


def test_killed_while_training_through_the_model_it_comes_to_the_same_end(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        fitted(tiny, tmp_path / "a", settings=THROUGH, progress=dies_at("through the model", 3))
    ends = []
    for name in ("a", "b"):
        with contextlib.suppress(NothingHelps):
            fitted(tiny, tmp_path / name, settings=THROUGH)
        ends.append(Landscape.from_pretrained(tmp_path / name / "landscape"))
    assert ends[0].rule == ends[1].rule
    for layer in ends[0].rule.layers:
        torch.testing.assert_close(ends[0].tensors[layer], ends[1].tensors[layer], atol=1e-3, rtol=1e-3)


def test_reading_the_dev_prompts_is_told_once(tiny: Tiny, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "reading the dev prompts":
            told.append((done, total))

    fitted(tiny, tmp_path, progress=progress)
    assert told[-1] == (told[-1][1],) * 2
    assert [done for done, _ in told] == sorted({done for done, _ in told})  # each batch once, not at every setting


def test_shuffled_outcomes_are_not_trained_through_the_model(tiny: Tiny, tmp_path: Path) -> None:
    stages: list[str] = []
    with contextlib.suppress(NothingHelps):
        fitted(
            tiny,
            tmp_path,
            settings=THROUGH.model_copy(update={"shuffle_outcomes": True}),
            progress=lambda stage, done, total: stages.append(stage),
        )
    assert not any("through the model" in stage for stage in stages)
    assert any("training the energy models" in stage for stage in stages)


# What depends on what


def refit(tiny: Tiny, folder: Path, settings: FitSettings) -> dict[str, bool]:
    """Fit again with other settings: which files were written anew."""
    files = ["completions.jsonl", "energy/1/energies.safetensors", "dev.jsonl", "frontier.jsonl"]
    before = {name: ((folder / name).stat().st_mtime_ns, (folder / name).read_bytes()) for name in files}
    with contextlib.suppress(NothingHelps):
        fitted(tiny, folder, settings=settings)
    return {
        Path(name).stem: ((folder / name).stat().st_mtime_ns, (folder / name).read_bytes()) != before[name]
        for name in files
    }


@pytest.mark.parametrize(
    ("change", "anew"),
    [
        ({}, set()),
        ({"training": {"width": 12}}, {"energies", "frontier"}),
        ({"seed": 4}, {"energies", "frontier"}),
        ({"shuffle_outcomes": True}, {"energies", "frontier"}),
        ({"tuning": {"etas": [2.0, 0.9, 0.3]}}, set()),
        ({"tuning": {**HELPS, "kl": 5.0}}, {"frontier"}),
        ({"tuning": {**HELPS, "tokens": 6}}, {"dev", "frontier"}),
        ({"collect": {"max_new_tokens": 5}}, {"completions", "energies", "dev", "frontier"}),
        ({"collect": {"system": "Be brief."}}, {"completions", "energies", "dev", "frontier"}),
    ],
    ids=lambda one: str(sorted(one) if isinstance(one, set) else one),
)
def test_a_changed_setting_redoes_just_what_depends_on_it(
    change: dict[str, Any], anew: set[str], tiny: Tiny, tmp_path: Path
) -> None:
    fitted(tiny, tmp_path)
    found = refit(tiny, tmp_path, tiny_settings(**{"tuning": HELPS, **change}))
    # The same answers may come of a longer limit and the same energies of them; what must not change is what counts.
    assert {name for name, changed in found.items() if changed} <= anew
    assert ("frontier" in anew) == found["frontier"]
    if "energies" in anew:
        assert found["energies"]
    if "collect" in change:
        assert found["completions"]


def test_a_prompt_rewritten_under_its_old_id_is_answered_anew(tiny: Tiny, tmp_path: Path) -> None:
    named = [Prompt(p.messages, p.harmful, p.source, id=f"row {at}") for at, p in enumerate(TRAIN)]
    fitted(tiny, tmp_path, prompts=named)
    rewritten = [*named[:-1], Prompt.of("WRECK THIS other thing entirely", True, id=named[-1].id)]
    before = lines(tmp_path / "completions.jsonl")
    with contextlib.suppress(NothingHelps):
        fitted(tiny, tmp_path, prompts=rewritten)
    assert len(lines(tmp_path / "completions.jsonl")) == len(before) + 1


def test_two_files_may_use_the_same_ids(tiny: Tiny, tmp_path: Path) -> None:
    numbered = [Prompt(p.messages, p.harmful, p.source, id=str(at // 2)) for at, p in enumerate(TRAIN)]
    fitted(tiny, tmp_path, prompts=numbered)
    rows = rows_of(tmp_path / "completions.jsonl")
    assert len({row["prompt_id"] for row in rows}) == len(TRAIN)


# What is wrong is said, and said first


def test_a_folder_in_use_is_left_alone(tiny: Tiny, tmp_path: Path) -> None:
    with RunFolder(tmp_path).owned(), pytest.raises(RunError, match="Another process is working"):
        fitted(tiny, tmp_path)
    assert not (tmp_path / "prompts.jsonl").exists()


def test_a_slip_in_the_settings_deletes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    fitted(tiny, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(JudgeError, match="no judge called 'ruels'"):
        fitted(tiny, tmp_path, settings=tiny_settings(collect={"judge": "ruels"}))
    with pytest.raises(PromptError, match="tokens long"):
        fitted(tiny, tmp_path, settings=tiny_settings(collect={"system": "x" * 600}))
    with pytest.raises(PromptError, match="tokens long"):
        fitted(tiny, tmp_path, dev=[*DEV, Prompt.of("x" * 600, False)])
    with pytest.raises(PromptError, match="no neutral prompt"):
        fitted(tiny, tmp_path, neutral=[])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("harmful", [False, True])
def test_one_class_missing_is_said(harmful: bool, tiny: Tiny, tmp_path: Path) -> None:
    only = [prompt for prompt in TRAIN if prompt.harmful == harmful]
    word = "benign" if harmful else "harmful"
    for dev in (DEV, None):
        with pytest.raises(PromptError, match=f"training prompts holds no {word} prompt"):
            fitted(tiny, tmp_path, prompts=only, dev=dev)
    with pytest.raises(PromptError, match=f"dev prompts holds no {word} prompt"):
        fitted(tiny, tmp_path, dev=[prompt for prompt in DEV if prompt.harmful == harmful])


class Always(LetterJudge):
    """Says the same of every answer to a training prompt."""

    label = "compliance"

    def judge(self, prompt: str, completion: str) -> Verdict:
        if prompt not in {one.text for one in TRAIN}:
            return super().judge(prompt, completion)
        return Verdict(self.label, 0.5, "always")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("label", "says"),
    [
        ("compliance", "There is nothing to learn: the model refuses 0 of its benign training prompts"),
        ("refusal", "Too few examples to learn from: helpful 0"),
        ("unscored", "There is nothing to learn: every answer was empty, repetitive or garbled"),
    ],
)
def test_a_model_without_all_outcomes_teaches_nothing(
    label: str, says: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Always, "label", label)
    monkeypatch.setitem(JUDGES, "letters", Always)
    with pytest.raises(RunError, match=says):
        fitted(tiny, tmp_path)


@pytest.mark.parametrize(
    ("kept", "says"), [("compliance", "refuses no benign dev"), ("refusal", "answers no benign dev")]
)
def test_dev_prompts_without_both_verdicts_cannot_be_tuned_on(
    kept: str, says: str, tiny: Tiny, whole: tuple[Landscape, Path], tmp_path: Path
) -> None:
    labels = {row["prompt_id"]: row["label"] for row in rows_of(whole[1] / "dev.jsonl")}
    with pytest.raises(PromptError, match=says):
        fitted(tiny, tmp_path, dev=[prompt for prompt in DEV if prompt.harmful or labels[prompt.id] == kept])


def test_a_disk_without_room_for_the_states_is_told_at_once(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is said to be needed holds all that is written, and no more than that and its copies."""
    refined = tiny_settings(tuning=HELPS, training={"refine_epochs": 1, "refine_units": 2})
    monkeypatch.setattr("elsteer.fitting.shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    with forward_passes(tiny[0]) as passes, pytest.raises(RunError, match="--run-dir on a larger disk") as told:
        fitted(tiny, tmp_path, settings=refined)
    assert passes == []
    assert "take 0.0 GB" in str(told.value), "of so tiny a model next to nothing"
    monkeypatch.undo()
    monkeypatch.setitem(JUDGES, "letters", LetterJudge)
    fitted(tiny, tmp_path, settings=refined)
    monkeypatch.setattr("elsteer.fitting.shutil.disk_usage", lambda _: SimpleNamespace(free=600_000))
    fitted(tiny, tmp_path, settings=refined)  # they are there, and so are the energies
    shutil.rmtree(tmp_path / "energy")
    fitted(tiny, tmp_path, settings=refined)  # their copies alone need room
    written = sum(file.stat().st_size for name in ("states", "dev_states") for file in (tmp_path / name).iterdir())
    monkeypatch.setattr("elsteer.fitting.shutil.disk_usage", lambda _: SimpleNamespace(free=1.05 * written))
    alone = tmp_path / "alone"
    landscape = Landscape.from_pretrained(tmp_path / "landscape")
    collect(*tiny, TRAIN, landscape, dev=DEV, run_dir=alone, settings=refined)
    assert sum(file.stat().st_size for file in (alone / "states").iterdir()) > 0, "what is needed is what is written"


def test_the_states_that_energies_without_a_context_are_trained_on_need_room_too(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refined = tiny_settings(tuning=HELPS, training={"refine_epochs": 1, "refine_units": 2, "context_blocks": 0})
    fitted(tiny, tmp_path, settings=refined)
    shutil.rmtree(tmp_path / "energy")
    monkeypatch.setattr("elsteer.fitting.shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(RunError, match="--run-dir on a larger disk"):
        fitted(tiny, tmp_path, settings=refined)


def test_what_no_setting_could_keep_is_said_before_anything_is_trained(tiny: Tiny, tmp_path: Path) -> None:
    stages: list[str] = []
    strict = tiny_settings(tuning={**HELPS, "safety_margin": 0.5})
    with pytest.raises(PromptError, match=r"refuses 62\.5% of the harmful.*--tuning-safety-margin 0\.187 or lower"):
        fitted(tiny, tmp_path, settings=strict, progress=lambda stage, done, total: stages.append(stage))
    assert not any("training the" in stage for stage in stages)


def test_a_model_that_thinks_first_is_not_judged_by_its_thoughts(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny[1].decode
    monkeypatch.setattr(tiny[1], "decode", lambda *given, **more: f"<think>\nOkay, {plain(*given, **more)}")
    with pytest.raises(RunError, match=r"thinks before it answers \('<think>.*--no-thinking.*--chat-template"):
        fitted(tiny, tmp_path)


def test_a_template_that_opens_a_thought_is_told_before_anything_is_asked(tiny: Tiny, tmp_path: Path) -> None:
    model, tokenizer = tiny[0], tiny_tokenizer("chatml")
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"
    with forward_passes(model) as passes, pytest.raises(RunError, match="ends in an opened thought"):
        fitted((model, tokenizer), tmp_path)
    assert passes == []


@pytest.mark.parametrize("name", ["org/named", "model"])
def test_answers_of_an_earlier_form_of_the_key_are_kept(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """That held the model's name, too, and of a folder the path as it was given."""
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    source = {"name": name, "revision": None, "origin": "hub"}
    monkeypatch.setattr(tiny[0], "elsteer_source", source, raising=False)
    fitted(tiny, tmp_path)
    stages = json.loads((tmp_path / "stages.json").read_text())
    collected = tiny_settings(tuning=HELPS).collect.model_dump()
    earlier = key_of(fingerprint(*tiny).to_dict(), collected, str(tiny[0].dtype), None)
    assert earlier != stages["collect"]
    (tmp_path / "stages.json").write_text(json.dumps({**stages, "collect": earlier}))
    files = [tmp_path / name for name in ("completions.jsonl", "dev.jsonl", "states/000000.safetensors")]
    before = [file.stat().st_mtime_ns for file in files]
    if name == "model":
        source["name"] = str(tmp_path / "model")
    fitted(tiny, tmp_path)
    assert [file.stat().st_mtime_ns for file in files] == before
    assert json.loads((tmp_path / "stages.json").read_text()) == stages


def test_a_thinking_mode_that_the_template_does_not_know_is_told(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fitted(tiny, tmp_path, settings=tiny_settings(tuning=HELPS, collect={"thinking": False}))
    assert "knows no thinking mode" in caplog.text


def test_prompts_are_asked_with_the_thinking_mode_of_the_settings(tiny: Tiny, tmp_path: Path) -> None:
    tokenizer, landscape = thoughtless(tiny[0])
    asked, prompts = tiny_settings(collect={"thinking": False}), {"completions": TRAIN[:8], "dev": DEV[:8]}
    collect(tiny[0], tokenizer, TRAIN[:8], landscape, dev=DEV[:8], run_dir=tmp_path, settings=asked)
    for name, some in prompts.items():
        answers = {row["prompt_id"]: row["text"] for row in rows_of(tmp_path / f"{name}.jsonl")}
        found = [answers[one.id] for one in some]
        assert found == said((tiny[0], tokenizer), some, thinking=False)
        assert found != said((tiny[0], tokenizer), some), "the mode must make a difference here"


def test_weights_that_no_gradient_goes_through_are_not_trained_through(tiny: Tiny, tmp_path: Path) -> None:
    """A quantised model of that kind needs a GPU's kernels; here the tiny one says of itself that it is one."""
    model = copy.copy(tiny[0])
    model.is_quantized, model.hf_quantizer = True, SimpleNamespace(is_trainable=False)
    with pytest.raises(RunError, match="--training-refine-epochs 0"):
        fit(model, tiny[1], TRAIN, dev=DEV, run_dir=tmp_path, settings=tiny_settings(training={"refine_epochs": 1}))
    assert fit(model, tiny[1], TRAIN, dev=DEV, neutral=NEUTRAL, run_dir=tmp_path, settings=tiny_settings(tuning=HELPS))


def test_another_name_or_commit_of_the_same_model_keeps_its_answers(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fitted(tiny, tmp_path)
    source = {"name": "org/renamed", "revision": "0" * 40, "origin": "hub"}
    monkeypatch.setattr(tiny[0], "elsteer_source", source, raising=False)
    with forward_passes(tiny[0]) as passes:
        again = fitted(tiny, tmp_path)
    assert passes == []
    assert again.digest() == first.digest()


def test_another_judge_under_the_same_name_of_a_folder_judges_anew(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a folder whose classifier was trained anew: the judge's own name tells."""
    fitted(tiny, tmp_path)
    monkeypatch.setattr(LetterJudge, "name", "letters, trained anew")
    with forward_passes(tiny[0]) as passes:
        fitted(tiny, tmp_path)
    assert passes


def test_sources_that_were_named_since_are_looked_at(tiny: Tiny, tmp_path: Path) -> None:
    fitted(tiny, tmp_path)
    named = [replace(one, source="mine" if one.harmful else "yours") for one in DEV]
    with forward_passes(tiny[0]) as passes:
        fitted(tiny, tmp_path, dev=named)
    assert passes, "its settings are tried anew, by what each source says"


def test_other_neutral_prompts_have_the_settings_tried_anew(tiny: Tiny, tmp_path: Path) -> None:
    first = fitted(tiny, tmp_path)
    others = [Prompt.of(text, False) for text in ("What is the hour?", "Tell me of the lake.")]
    assert fitted(tiny, tmp_path, neutral=others).provenance["dev"]["kl"] != first.provenance["dev"]["kl"]


def test_the_same_weights_in_another_precision_answer_anew(tiny: Tiny, tmp_path: Path) -> None:
    half = copy.deepcopy(tiny[0]).bfloat16()
    whole = copy.deepcopy(half).float()
    assert fingerprint(half, tiny[1]) == fingerprint(whole, tiny[1])

    def begins(model: PreTrainedModel) -> int:
        """With so many answers that are there."""
        found: list[int] = []

        def progress(stage: str, done: int, total: int) -> None:
            if stage == "answering the training prompts":
                found.append(done)
            elif stage == "answering the dev prompts":
                raise Killed(stage)

        with pytest.raises(Killed):
            fitted((model, tiny[1]), tmp_path, progress=progress)
        return found[0]

    assert [begins(model) for model in (whole, whole, half, half, whole)] == [0, len(TRAIN), 0, len(TRAIN), 0]


def test_states_that_are_made_anew_leave_nothing_that_other_methods_learned_from_the_old(
    tiny: Tiny, tmp_path: Path
) -> None:
    """The same verdicts may come of other states, so that verdicts alone do not tell what a network was trained on."""
    collect(*tiny, TRAIN, tiny_landscape(tiny[0]), dev=DEV, run_dir=tmp_path, settings=tiny_settings())
    kept = tmp_path / "baselines/els-paper/0.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"")
    collect(*tiny, TRAIN, tiny_landscape(tiny[0]), dev=DEV, run_dir=tmp_path, settings=tiny_settings(seed=4))
    assert kept.exists()
    longer = tiny_settings(collect={"max_new_tokens": 5})
    collect(*tiny, TRAIN, tiny_landscape(tiny[0]), dev=DEV, run_dir=tmp_path, settings=longer)
    assert not kept.exists()


def test_neutral_prompts_of_ones_own_are_so_many_at_most(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elsteer.fitting._NEUTRAL_AT_MOST", 4)
    stages: list[tuple[str, int]] = []
    many = [Prompt.of(f"What is the time in {one.text}?", False) for one in some_prompts(30, 700)]
    fitted(tiny, tmp_path, neutral=many, progress=lambda stage, done, total: stages.append((stage, total)))
    assert max(total for stage, total in stages if stage == "checking the answers") <= 4


def test_energies_that_were_trained_anew_leave_no_trials_of_the_old(tiny: Tiny, tmp_path: Path) -> None:
    fitted(tiny, tmp_path)
    shutil.rmtree(tmp_path / "energy")
    with forward_passes(tiny[0]) as passes:
        fitted(tiny, tmp_path)
    assert passes


def test_killed_where_energies_are_saved_it_leaves_no_trials_of_the_old(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted(tiny, tmp_path)
    shutil.rmtree(tmp_path / "energy")

    def saved(*given: Any) -> None:
        save_energies(*given)
        raise Killed

    monkeypatch.setattr("elsteer.training.save_energies", saved)
    with pytest.raises(Killed):
        fitted(tiny, tmp_path)
    assert not (tmp_path / "frontier.jsonl").exists()


@pytest.mark.parametrize(("gates", "read"), [([None], False), ([None, 0.25], True)])
def test_states_of_dev_prompts_are_read_where_a_gate_needs_them(
    gates: list[float | None], read: bool, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, plain = [], StateStore.read

    def told(store: StateStore, *given: Any, **more: Any) -> Any:
        folders.append(store.folder.name)
        return plain(store, *given, **more)

    monkeypatch.setattr(StateStore, "read", told)
    with contextlib.suppress(NothingHelps):
        fitted(tiny, tmp_path, settings=tiny_settings(tuning={**HELPS, "gates": gates}))
    assert ("dev_states" in folders) == read


def test_a_collection_beside_a_landscape_asks_as_its_fit_did(tiny: Tiny, tmp_path: Path) -> None:
    asking = tiny_settings(tuning=HELPS, collect={"system": "Be kind."})
    found = fitted(tiny, tmp_path / "fit", settings=asking)
    with pytest.raises(RunError, match=r"asked with system='Be kind\.'"):
        collect(*tiny, TRAIN, found, dev=DEV, run_dir=tmp_path / "theirs", settings=tiny_settings())
    collect(*tiny, TRAIN, found, dev=DEV, run_dir=tmp_path / "theirs", settings=asking)


def test_nothing_helps_says_so_and_saves_a_landscape_that_steers_nothing(tiny: Tiny, tmp_path: Path) -> None:
    impossible = tiny_settings(tuning={**HELPS, "safety_margin": 0.37})  # of 37.5 points that are left to gain
    with pytest.raises(NothingHelps, match=r"saved with strength 0") as caught:
        fitted(tiny, tmp_path, settings=impossible)
    assert caught.value.exit_code == 3
    assert "the one that removed most broke this: harmful refusals not above the plain model's" in str(caught.value)
    found = Landscape.from_pretrained(tmp_path / "landscape")
    assert found.rule.strength == 0
    assert found.provenance["dev"]["why_not"] == ["harmful refusals not above the plain model's by the margin"]
    plain = logits(tiny)
    with found.attach(*tiny[:1], tokenizer=tiny[1]):
        assert torch.equal(logits(tiny), plain)
    assert (tmp_path / "frontier.png").exists()
    with forward_passes(tiny[0]) as passes, pytest.raises(NothingHelps):
        fitted(tiny, tmp_path, settings=impossible)
    assert passes == []


def test_damaged_energies_are_told(tiny: Tiny, tmp_path: Path) -> None:
    fitted(tiny, tmp_path)
    path = tmp_path / "energy/1/energies.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(RunError, match=r"energy/1 is damaged: delete it and run the same command again"):
        fitted(tiny, tmp_path)


@pytest.mark.parametrize("damage", ["[]", "{", "null", '{"outcomes": {}, "auroc": [], "epochs": {}}', "[" * 100_000])
def test_a_damaged_word_on_the_training_is_told(damage: str, tmp_path: Path) -> None:
    save_energies(tmp_path / "energy", Energies({0: {"weight": torch.ones(3)}}, {}, {}, {}, {}))
    (tmp_path / "energy/training.json").write_text(damage)
    with pytest.raises(RunError, match="energy is damaged: delete it and run the same command again"):
        read_energies(tmp_path / "energy")


def test_a_product_s_energies_for_one_more_weight_follow_from_the_first(tiny: Tiny, tmp_path: Path) -> None:
    fitted(tiny, tmp_path)
    more = tiny_settings(tuning=HELPS, training={"benign_weights": [1.0, 3.0]})
    stages: list[str] = []
    found = fitted(tiny, tmp_path, settings=more, progress=lambda stage, done, total: stages.append(stage))
    assert not any("training the" in stage for stage in stages)
    assert {row["trial"]["rule"]["benign_weight"] for row in rows_of(tmp_path / "frontier.jsonl")} == {1.0, 3.0}
    first = read_energies(tmp_path / "energy/1")
    for layer, tensors in first.asking_for(3.0).tensors.items():
        before = first.tensors[layer]["bias"]
        torch.testing.assert_close(tensors["bias"], before - torch.tensor([math.log(3.0), 0.0]))
        if found.provenance["dev"]["rule"]["benign_weight"] == 3.0 and layer in found.rule.layers:
            assert torch.equal(found.tensors[layer]["bias"], tensors["bias"])


def test_a_weight_shifts_u_by_as_much_as_its_gain_asks(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[float, float]] = []
    asking_for = Energies.asking_for

    def told(energies: Energies, ratio: float, gain: float = 1.0) -> Energies:
        asked.append((ratio, gain))
        return asking_for(energies, ratio, gain)

    monkeypatch.setattr(Energies, "asking_for", told)
    training = {"refine_epochs": 1, "refine_gain": 4.0, "benign_weights": [1.0, 3.0]}
    with contextlib.suppress(NothingHelps):
        fitted(tiny, tmp_path, settings=tiny_settings(tuning=HELPS, training=training))
    assert asked == [(3.0, 4.0)]
    first = read_energies(tmp_path / "energy/1")
    for layer, tensors in asking_for(first, 3.0, 4.0).tensors.items():
        shift = tensors["bias"][0] - first.tensors[layer]["bias"][0]
        assert float(shift) == pytest.approx(-4 * math.log(3), abs=1e-4)


def test_one_more_weight_leaves_the_networks_of_the_others_as_they_are(tiny: Tiny, tmp_path: Path) -> None:
    network = {"energy": "network", "epochs": 4}
    with contextlib.suppress(NothingHelps):
        fitted(tiny, tmp_path, settings=tiny_settings(tuning=HELPS, training=network))
    first = tmp_path / "energy/1/energies.safetensors"
    before = (first.stat().st_mtime_ns, first.read_bytes())
    more = tiny_settings(tuning=HELPS, training={**network, "benign_weights": [1.0, 3.0]})
    stages: list[str] = []
    with contextlib.suppress(NothingHelps):
        fitted(tiny, tmp_path, settings=more, progress=lambda stage, done, total: stages.append(stage))
    found = Landscape.from_pretrained(tmp_path / "landscape")
    assert (first.stat().st_mtime_ns, first.read_bytes()) == before
    assert first.read_bytes() != (tmp_path / "energy/3/energies.safetensors").read_bytes()
    assert {stage for stage in stages if "training the" in stage} == {"training the energy models, benign weight 3"}
    tried = {row["trial"]["rule"]["benign_weight"] for row in rows_of(tmp_path / "frontier.jsonl")}
    assert tried == {1.0, 3.0}
    weight = found.provenance["dev"]["rule"]["benign_weight"]
    chosen = json.loads((tmp_path / f"energy/{weight:g}/training.json").read_text())
    told = {int(layer): row for layer, row in found.provenance["auroc"].items()}
    assert told == {int(layer): row for layer, row in chosen["auroc"].items()}


def test_other_lengths_or_weights_to_try_keep_the_trials_of_those_before(tiny: Tiny, tmp_path: Path) -> None:
    both = tiny_settings(tuning={"etas": [0.3]}, training={"benign_weights": [1.0, 3.0]})
    with contextlib.suppress(NothingHelps):
        fitted(tiny, tmp_path, settings=both)
    before = lines(tmp_path / "frontier.jsonl")
    more = tiny_settings(tuning={"etas": [1e-9, 2e-9], "least_removed": 10.0}, training={"benign_weights": [1.0]})
    with pytest.raises(NothingHelps):
        fitted(tiny, tmp_path, settings=more)
    after = lines(tmp_path / "frontier.jsonl")
    assert after[: len(before)] == before
    assert len(after) > len(before)
    rule = Landscape.from_pretrained(tmp_path / "landscape").provenance["dev"]["rule"]  # of those that are tried now
    assert (rule["benign_weight"], rule["eta"]) in {(1.0, 1e-9), (1.0, 2e-9)}


# Which prompts


def test_training_prompts_that_repeat_a_dev_prompt_are_left_out(tiny: Tiny, tmp_path: Path) -> None:
    copies = [Prompt.of(f"{prompt.text.lower()}!", prompt.harmful, source="copy") for prompt in DEV[:6]]
    fitted(tiny, tmp_path, prompts=[*TRAIN, *TRAIN[:3], *copies, *DEV[6:9]])
    rows = rows_of(tmp_path / "prompts.jsonl")
    assert [row["id"] for row in rows if row["split"] == "train"] == [prompt.id for prompt in TRAIN]
    with pytest.raises(PromptError, match="Every training prompt nearly repeats a dev prompt"):
        fitted(tiny, tmp_path, prompts=DEV)


def test_without_dev_prompts_a_share_is_set_aside_and_no_family_is_on_both_sides(tiny: Tiny, tmp_path: Path) -> None:
    families = [
        Prompt(p.messages, p.harmful, p.source, family=f"family {at // 4}") for at, p in enumerate(some_prompts(160))
    ]
    with contextlib.suppress(NothingHelps):
        fitted(tiny, tmp_path, prompts=families, dev=None)
    rows = [row for row in rows_of(tmp_path / "prompts.jsonl") if row["split"] != "neutral"]
    by_split = {name: {row["family"] for row in rows if row["split"] == name} for name in ("train", "dev")}
    assert not by_split["train"] & by_split["dev"]
    assert 0.2 < sum(row["split"] == "dev" for row in rows) / len(rows) < 0.4
    assert len(rows) == len(families)


def test_training_and_dev_prompts_are_attacked_too(tiny: Tiny, tmp_path: Path) -> None:
    settings = tiny_settings(attacks=["role-play", "authority"], attack_share=0.5, attack_dev_share=0.5, tuning=HELPS)
    landscape = fitted(tiny, tmp_path, settings=settings)
    rows = rows_of(tmp_path / "prompts.jsonl")
    train, dev = ([row for row in rows if row["split"] == name] for name in ("train", "dev"))
    copies = [row for row in train if "+" in row["source"]]
    direct = [row for row in train if "+" not in row["source"]]
    fit_in, drawn = len(copies), round(len(direct) / 2)  # some templates are too long for a context of 512 tokens
    assert 15 < fit_in < drawn
    assert {row["harmful"] for row in copies} == {True, False}
    assert {row["source"] for row in copies} == {"test+role-play", "test+authority"}
    assert {row["family"] for row in copies} <= {row["family"] for row in direct}
    shares = Counter("+" in row["source"] for row in dev)
    assert 0 < shares[True] <= round(shares[False] / 2)
    answered = {row["prompt_id"] for row in rows_of(tmp_path / "completions.jsonl")}
    assert {row["id"] for row in copies} <= answered
    assert landscape.provenance["settings"]["attacks"] == ["role-play", "authority"]


def test_limits_draw_by_seed(tiny: Tiny, tmp_path: Path) -> None:
    with contextlib.suppress(NothingHelps):
        fitted(tiny, tmp_path, prompts=some_prompts(160), settings=tiny_settings(limit=80, dev_limit=30, tuning=HELPS))
    rows = rows_of(tmp_path / "prompts.jsonl")
    assert sum(row["split"] == "train" for row in rows) == 80
    assert sum(row["split"] == "dev" for row in rows) == 30


# More states, gates, controls


def test_states_of_generated_tokens_gates_windows_and_no_guard_go_through(
    tiny: Tiny, whole: tuple[Landscape, Path], tmp_path: Path
) -> None:
    tuning = {**HELPS, "gates": [None, 0.25], "windows": [1, 2], "steps": [1, 2], "guards": [True, False]}
    with contextlib.suppress(NothingHelps):
        fitted(tiny, tmp_path, settings=tiny_settings(collect={"state_tokens": 3}, tuning=tuning))
    trials = [row["trial"] for row in rows_of(tmp_path / "frontier.jsonl")]
    rules = [trial["rule"] for trial in trials]
    for name, values in {"gate": {None, 0.25}, "window": {1, 2}, "steps": {1, 2}, "guard": {True, False}}.items():
        assert {rule[name] for rule in rules} == values
    assert {round(rule["eta"] * rule["steps"], 6) for rule in rules} == set(HELPS["etas"])
    # A gate, a guard and more steps change what the model does, not the words in the file alone.
    screened = [trial for trial in trials if trial["stage"] == "screening"]
    for name in ("gate", "guard", "steps"):
        figures: dict[str, list[tuple[float, ...]]] = {}
        for trial in screened:
            rule = {**trial["rule"], "eta": round(trial["rule"]["eta"] * trial["rule"]["steps"], 6), name: None}
            found = trial["answered_benign"], trial["refused_harmful"], trial["kl"]
            figures.setdefault(json.dumps({**rule, "steps": None if name == "steps" else rule["steps"]}), []).append(
                found
            )
        assert any(len(set(same)) > 1 for same in figures.values()), name
    landscape = Landscape.from_pretrained(tmp_path / "landscape")
    chosen, steered = landscape.provenance["dev"]["rule"], landscape.rule
    assert (steered.window, steered.steps, steered.guard) == (chosen["window"], chosen["steps"], chosen["guard"])
    assert (steered.gates is None) == (chosen["gate"] is None)
    counts = StateStore(tmp_path / "states").read([one.id for one in TRAIN], layers=slice(0, 0))[1]
    assert int(counts.max()) == 3
    read, of_prompts = (read_energies(folder / "energy/1").tensors[2]["weight"] for folder in (tmp_path, whole[1]))
    assert not torch.allclose(read, of_prompts, atol=1e-3), "generated tokens' states are learned from, too"


def test_as_many_states_are_kept_of_every_training_prompt_as_are_asked_for(tiny: Tiny, tmp_path: Path) -> None:
    """More than an answer may have tokens, and of prompts of which the first token alone is looked at, too."""
    asked, prompts = tiny_settings(collect={"state_tokens": 5, "full_answers": 16}), TRAIN[:24]
    collect(*tiny, prompts, tiny_landscape(tiny[0]), dev=DEV[:8], run_dir=tmp_path, settings=asked)
    assert [len(rows_of(tmp_path / name)) for name in ("completions.jsonl", "glimpses.jsonl")] == [16, 8]
    states, counts = StateStore(tmp_path / "states").read([one.id for one in prompts])
    assert states.shape == (24, 5, 4, 32)
    assert counts.tolist() == [5] * 24


def test_the_shuffled_control_steers_by_the_same_rule_on_other_energies(
    tiny: Tiny, whole: tuple[Landscape, Path]
) -> None:
    found, folder = whole
    gated = found.with_rule(gates=dict.fromkeys(found.rule.layers, 0.0), window=1)
    control = shuffled_control(folder, gated)
    assert control.method == "shuffled"
    assert control.rule == found.with_rule(window=1).rule
    assert control.fingerprint == found.fingerprint
    layer = found.rule.layers[-1]
    assert torch.equal(control.guards[layer], found.guards[layer])
    assert not torch.equal(control.tensors[layer]["weight"], found.tensors[layer]["weight"])
    again = shuffled_control(folder, Landscape.from_pretrained(folder / "landscape"))
    assert torch.equal(again.tensors[layer]["weight"], control.tensors[layer]["weight"])
    other = shuffled_control(folder, found, draw=1)
    assert not torch.equal(other.tensors[layer]["weight"], control.tensors[layer]["weight"])
    with control.attach(tiny[0], tokenizer=tiny[1]):
        assert torch.isfinite(logits(tiny)).all()


def test_the_shuffled_control_needs_the_run_folder(whole: tuple[Landscape, Path], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no settings\.yaml"):
        shuffled_control(tmp_path, whole[0])
    for name in ("settings.yaml", "prompts.jsonl"):
        (tmp_path / name).write_bytes((whole[1] / name).read_bytes())
    with pytest.raises(RunError, match=f"lacks the answers of {len(TRAIN)} training prompts"):
        shuffled_control(tmp_path, whole[0])


def test_shuffling_keeps_each_kinds_verdicts_and_moves_them() -> None:
    outcomes = ["helpful", "false_refusal"] * 20 + ["jailbreak", "safe_refusal", "safe_refusal"] * 10
    harmful = [one in ("jailbreak", "safe_refusal") for one in outcomes]
    found = shuffled(outcomes, harmful, 0)
    assert sorted(found[:40]) == sorted(outcomes[:40])
    assert sorted(found[40:]) == sorted(outcomes[40:])
    assert found != outcomes
    assert found == shuffled(outcomes, harmful, 0)
    assert found != shuffled(outcomes, harmful, 1)


def test_energies_are_read_as_they_were_saved(tmp_path: Path) -> None:
    rows: Callable[[int], torch.Tensor] = torch.randn
    energies = Energies(
        {0: {"weight": rows(3), "hidden_weights.0": rows(2)}, 11: {"weight": rows(4)}},
        {0: torch.zeros(5, 1), 11: rows(5)[:, None]},
        {0: {"all": 0.5}, 11: {"all": 1.0}},
        {0: 3, 11: 0},
        {"helpful": 9},
    )
    save_energies(tmp_path / "energy", energies)
    found = read_energies(tmp_path / "energy")
    assert (found.auroc, found.epochs, found.counts) == (energies.auroc, energies.epochs, energies.counts)
    assert torch.equal(found.tensors[0]["hidden_weights.0"], energies.tensors[0]["hidden_weights.0"])
    assert torch.equal(found.guards[11], energies.guards[11])
    assert math.isclose(float(found.guards[0].sum()), 0)
