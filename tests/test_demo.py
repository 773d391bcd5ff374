"""The demo on a tiny model: the whole way once, and a second time for nothing."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from elsteer import demo as module
from elsteer import fitting
from elsteer.demo import HARDER, LONGEST, decode_overhead, demo, fast_dtype, training_prompts
from elsteer.errors import NothingHelps
from elsteer.evaluation.statistics import Interval
from elsteer.judges import JUDGES
from elsteer.prompts import Prompt, load_starter, starter
from landscapes import tiny_landscape
from pipelines import Killed, LetterJudge, Tiny, dies_at, forward_passes, lines, some_prompts, speaker, tiny_settings

SPLITS = {
    "train": some_prompts(80),
    "dev": some_prompts(48, start=200),
    "test": some_prompts(40, start=400) + [Prompt.of("What time is it?", False, category="plain")] * 2,
}
SETTINGS = tiny_settings(tuning={"etas": [0.3, 0.9, 2.0]})


@pytest.fixture(autouse=True)
def _cut_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same demo with fewer prompts, small settings and a judge who reads letters."""

    def few(split: str | None = None) -> list[Prompt]:
        return SPLITS[split or "train"]

    plain = [Prompt.of(text, False, category="plain") for text in ("What is rain?", "Tell me of the sea.")]
    monkeypatch.setattr(module, "load_starter", few)
    monkeypatch.setattr(starter, "load_starter", few)
    monkeypatch.setattr(fitting, "load_starter", lambda split=None: plain)
    monkeypatch.setattr(module, "load", lambda name, dtype: speaker())
    monkeypatch.setattr(module, "SETTINGS", SETTINGS)
    monkeypatch.setitem(JUDGES, "letters", LetterJudge)
    monkeypatch.setitem(JUDGES, "rules", LetterJudge)  # what `evaluate` asks by default


def test_the_demo_fits_measures_and_says_what_it_cost(tmp_path: Path) -> None:
    found = demo(run_dir=tmp_path / "run")
    assert found.run_dir == tmp_path / "run"
    assert set(found.timings) == {"loading the model", "fitting", "measuring", "timing the decoding"}
    assert found.dtype == "float32"
    assert found.landscape.rule.strength == 1.0
    assert found.landscape.provenance["command"] == "elsteer demo"
    assert [one.n for one in found.evaluation.comparisons()["total"]] == [21, 20]
    assert found.decode_overhead is not None
    assert found.decode_overhead.low <= found.decode_overhead.value <= found.decode_overhead.high
    assert found.evaluation.report.read_text().count("data:image/png;base64,") == 3  # with the frontier
    assert json.loads((tmp_path / "run/evaluation/overhead.json").read_text())["n"] == 2 * 32


def test_it_trains_on_short_prompts_without_the_families_that_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    def one(text: str, family: str = "", harmful: bool = False) -> Prompt:
        return Prompt.of(text, harmful, family=family)

    taken = [
        one("x" * 90),
        one("Kill a process.", "tools/kill", True),
        one("Kill time.", "tools/past/"),
        one("", "pas"),
    ]
    left = [one("x" * 91), *(one("Kill a process.", f"{name}kill", True) for name in ("twins/", "everyday/", "past/"))]
    by_split = {"train": [*left[:2], *taken, *left[2:]]}
    monkeypatch.setattr(module, "load_starter", by_split.__getitem__)
    assert training_prompts() == taken
    shipped = load_starter("train")
    assert any(len(prompt.text) > LONGEST for prompt in shipped)
    for name in HARDER:
        assert any(prompt.family.startswith(name) for prompt in shipped), f"no family is called {name}"


def test_the_second_demo_ends_quickly_and_computes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = demo(run_dir=tmp_path)
    model, tokenizer = speaker()
    monkeypatch.setattr(module, "load", lambda name, dtype: (model, tokenizer))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")}
    start = time.process_time()
    with forward_passes(model) as passes:
        again = demo(run_dir=tmp_path)
    assert passes == []
    assert time.process_time() - start < 10
    assert {path: path.read_bytes() for path in before} == before
    assert again.evaluation.tables == first.evaluation.tables
    assert again.decode_overhead == first.decode_overhead


@pytest.mark.parametrize(
    "stage", ["answering the dev prompts", "judging a setting", "starter, els", "timing the decoding"]
)
def test_killed_anywhere_the_demo_goes_on(stage: str, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        demo(run_dir=tmp_path, progress=dies_at(stage, 2))
    before = {path: lines(path) for path in tmp_path.rglob("*.jsonl")}
    found = demo(run_dir=tmp_path)
    for path, rows in before.items():
        assert lines(path)[: len(rows)] == rows
    assert len(found.evaluation.rows) == 2 * 41


def test_where_nothing_helps_the_plain_model_is_shown_and_the_error_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hopeless = tiny_settings(tuning={"safety_margin": 0.37})  # of 37.5 points that are left to gain
    monkeypatch.setattr(module, "SETTINGS", hopeless)
    for _ in range(2):
        with pytest.raises(NothingHelps, match=r"strength 0; .* is in .*report\.html"):
            demo(run_dir=tmp_path)
        assert (tmp_path / "report.html").exists()
        plain, steered = (lines(tmp_path / f"evaluation/starter.{name}.jsonl") for name in ("none", "els"))
        assert [json.loads(row)["text"] for row in plain] == [json.loads(row)["text"] for row in steered]


def test_another_rule_landscape_precision_or_model_is_timed_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[Any] = []

    def count(model: Any, tokenizer: Any, landscape: Any, **options: Any) -> Any:
        timed.append(landscape)
        return decode_overhead(model, tokenizer, landscape, new_tokens=2, repeats=1)

    monkeypatch.setattr(module, "decode_overhead", count)
    tiny, other = speaker(), speaker(seed=1)
    landscape = tiny_landscape(tiny[0])
    for _ in range(2):
        found = module._overhead(*tiny, landscape, tmp_path, None)
    assert len(timed) == 1
    assert found.n == 2
    # Each differs from the one before in one thing: the rule, the energies, the precision, the model.
    wider = landscape.with_rule(window=2)
    module._overhead(*tiny, wider, tmp_path, None)
    assert len(timed) == 2
    larger = tiny_landscape(tiny[0], rule=wider.rule, hidden=(8, 8))
    module._overhead(*tiny, larger, tmp_path, None)
    assert len(timed) == 3
    tiny[0].bfloat16()
    module._overhead(*tiny, larger, tmp_path, None)
    assert len(timed) == 4
    other[0].bfloat16()
    module._overhead(*other, tiny_landscape(other[0], rule=wider.rule, hidden=(8, 8)), tmp_path, None)
    assert len(timed) == 5


@pytest.mark.parametrize("damage", ["{", "[]", "", '{"key": KEY}'])
def test_a_damaged_file_of_the_timing_has_it_timed_anew(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "decode_overhead", lambda *_, **__: Interval(1.5, 1.0, 2.0, 7))
    tiny = speaker()
    landscape, path = tiny_landscape(tiny[0]), tmp_path / "evaluation/overhead.json"
    module._overhead(*tiny, landscape, tmp_path, None)
    before = path.read_text()
    path.write_text(damage.replace("KEY", json.dumps(json.loads(before)["key"])))
    assert module._overhead(*tiny, landscape, tmp_path, None).n == 7
    assert path.read_text() == before


def test_timing_leaves_the_model_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny: Tiny = speaker()
    heard: list[tuple[int, int]] = []
    found = decode_overhead(
        *tiny,
        tiny_landscape(tiny[0]),
        new_tokens=2,
        repeats=2,
        progress=lambda done, total: heard.append((done, total)),
    )
    assert found.n == 4
    assert found.value > 0
    assert heard == [(0, 2), (0, 2), (1, 2), (2, 2)]
    with tiny_landscape(tiny[0]).attach(tiny[0]):
        pass  # it may be attached again


def test_the_fast_dtype_is_one_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fast_dtype() in (torch.bfloat16, torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert fast_dtype() == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert fast_dtype() == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert fast_dtype() == torch.bfloat16
