"""README and docs: links and files that are named exist, commands and options exist, examples run on tiny models."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import torch
import yaml

import elsteer
from elsteer.cli import app
from elsteer.comparison.compare import compare
from elsteer.evaluation.evaluate import evaluate
from elsteer.evaluation.figures import read_figures
from elsteer.files import append_jsonl
from elsteer.fitting import collect, fit
from elsteer.models import load
from elsteer.prompts import FAMILIES, SUITES
from elsteer.settings import FitSettings
from elsteer.tuning import Trial
from landscapes import tiny_landscape
from tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(text_of(name)) if kind == language]


def inline(name: str) -> list[str]:
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", FENCE.sub("", text_of(name)))


def commands(name: str) -> Iterator[list[str]]:
    """What follows `elsteer` in consoles and in inline code."""
    lines = [line.removeprefix("$ ") for block in blocks(name, "console") for line in block.splitlines()]
    for line in [*lines, *inline(name)]:
        words = shlex.split(line, comments=True)
        if words[:1] == ["elsteer"] and len(words) > 1:
            yield words[1:]


def named(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that `words` begin with, and the rest."""
    command: click.Command = app
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"there is no command {words[0]!r} in {command.name}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


def flags(command: click.Command) -> set[str]:
    return {flag for one in command.params for flag in (*one.opts, *one.secondary_opts)} | {"--help", "-h"}


def all_flags(command: click.Command) -> set[str]:
    below = command.commands.values() if isinstance(command, click.Group) else ()
    return flags(command).union(*map(all_flags, below))


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text_of(name))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path) if path else page
        assert found.exists(), f"{name} links to {target}"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_named_exist(name: str) -> None:
    for word in inline(name):
        if re.fullmatch(r"(src|tests|docs|benchmarks)/[\w./-]+", word):
            assert (ROOT / word).exists(), f"{name} names {word}"
    for block in blocks(name, "console"):
        for path in re.findall(r"\b(?:src|tests|docs|benchmarks)/[\w./-]+", block):
            assert (ROOT / path).exists(), f"{name} names {path}"


def test_a_benchmark_that_is_asked_for_help_does_not_measure() -> None:
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "__main__" in text:  # without options it would measure, and replace what is recorded
            assert ".parse_args()" in text or "no_options(__doc__)" in text, path.name


def test_files_of_the_layout_exist() -> None:
    rows = re.search(r"## Layout\n(.*?)\n## ", text_of("docs/contributing.md"), re.DOTALL)
    assert rows
    named_there = re.findall(r"`([\w/]+(?:\.py|/))`", rows[1])
    assert len(named_there) > 15
    for word in named_there:
        places = [ROOT / word, *(ROOT / "src/elsteer").glob(f"**/{word.rstrip('/')}")]
        assert any(place.exists() for place in places), word


@pytest.mark.parametrize("name", NAMES)
def test_commands_and_their_options_exist(name: str) -> None:
    for words in commands(name):
        command, rest = named(words)
        for word in rest:
            if word.startswith("-"):
                assert word.partition("=")[0] in flags(command), f"{name}: elsteer {shlex.join(words)}: {word}"


@pytest.mark.parametrize("name", NAMES)
def test_options_named_by_themselves_exist(name: str) -> None:
    known = all_flags(app)
    for words in map(str.split, inline(name)):
        if words and words[0].startswith("--"):
            assert words[0] in known, f"{name}: {words[0]}"


@pytest.mark.parametrize("name", NAMES)
def test_scripts_and_make_targets_exist(name: str) -> None:
    for line in [*inline(name), *"\n".join(blocks(name, "console")).splitlines()]:
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"] and len(words) > 1:
            assert re.search(rf"^{words[1]}:", text_of("Makefile"), re.MULTILINE), line
        if words[:1] == ["python"] and words[1].endswith(".py"):
            script = text_of(words[1])
            assert all(f'"{word}"' in script for word in words if word.startswith("--")), line


def test_every_command_is_in_the_readme() -> None:
    told = {words[0] for words in commands("README.md")}
    assert told >= set(app.commands)


def test_settings_in_the_tuning_page_have_the_defaults_that_it_says() -> None:
    settings = FitSettings().tuning
    page = text_of("docs/tuning.md")
    for name, value in (
        ("safety_margin", f"{settings.safety_margin} of the harmful prompts"),
        ("safety_weighted", f"{settings.safety_weighted}"),
        ("worst_source", f"{settings.worst_source}"),
        ("refusal_level", f"{settings.refusal_level:.0%}"),
        ("perplexity_ratio", f"at most {settings.perplexity_ratio}"),
        ("kl", f"at most {settings.kl}"),
    ):
        assert re.search(rf"\| `{name}` \| {re.escape(value)} \|", page), name
    assert settings.gates == (None,)
    assert settings.windows == (0,)
    algorithm, training = text_of("docs/algorithm.md"), FitSettings().training
    for words in (
        f"`width` ({training.width})",
        f"(`dropout`, {training.dropout})",
        f"(`temperature`, {training.temperature})",
        f"`batch_per_outcome` ({training.batch_per_outcome})",
        f"`across` ({training.across})",
        f"`benign_weights` ({', '.join(f'{one:g}' for one in training.benign_weights)};",
        f"(L2 penalty `ridge`, {training.ridge}, on the mean loss",
        "Tuning tries no gate by default (`gates`)",
        f"Tuning tries {settings.windows[0]} by default (`windows`)",
    ):
        assert words in algorithm, words


def test_the_tables_of_suites_and_attacks_are_those_of_the_code() -> None:
    rows = {
        row[1]: row[0] for row in re.findall(r"^(\| \[?`([a-z][\w-]+)`\]?.*)$", text_of("docs/suites.md"), re.MULTILINE)
    }
    read = {name for name, suite in SUITES.items() if not suite.parts and not suite.starter}
    assert set(rows) == read | set(FAMILIES)
    for name in read:
        suite = SUITES[name]
        revision = f"`{suite.revision}`" if suite.revision else "newest" if suite.hub else ""
        hub = f"`{suite.hub}`" if suite.hub else "not there"
        count = f"{suite.rows:,}" if suite.rows else ""
        answer = "by row" if suite.harmful is None else "refusal" if suite.harmful else "help"
        cells = [cell.strip() for cell in rows[name].strip("|").split("|")]
        assert cells[0] == f"[`{name}`]({suite.url})"
        assert (cells[1], cells[2], cells[4], cells[5]) == (count, answer, revision, suite.licence), name
        assert hub in cells[3]
        assert ("(gated)" in cells[3]) == suite.gated
    for name, family in FAMILIES.items():
        use = "fitting, reporting" if family.use == "train" else "reporting only"
        link = f"[`{name}`]({family.url})" if family.url else f"`{name}`"
        assert rows[name] == f"| {link} | {family.description} | {use} |"


@pytest.mark.parametrize("name", [name for name in NAMES if blocks(name, "yaml")])
def test_yaml_examples_are_settings(name: str) -> None:
    for block in blocks(name, "yaml"):
        FitSettings.model_validate(yaml.safe_load(block))


@pytest.mark.parametrize("name", [name for name in NAMES if blocks(name, "python")])
def test_python_examples_compile(name: str) -> None:
    for block in blocks(name, "python"):
        ast.parse(block)


@pytest.mark.parametrize("name", [name for name in NAMES if blocks(name, "python")])
def test_python_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's examples one after the other, on a tiny model; what takes minutes only has its arguments checked."""
    model, tokenizer = tiny_model(max_position_embeddings=512), tiny_tokenizer()
    landscape = tiny_landscape(model)

    def checked(function: Any, result: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            inspect.signature(function).bind(*args, **kwargs)
            return result

        return call

    for function, result in (
        (load, (model, tokenizer)),
        (fit, landscape),
        (evaluate, SimpleNamespace(sentence="Fewer refusals.")),
        (compare, SimpleNamespace(sentence="Fewer refusals.")),
    ):
        monkeypatch.setattr(elsteer, function.__name__, checked(function, result), raising=False)
    monkeypatch.setattr("elsteer.fitting.collect", checked(collect, None))
    monkeypatch.chdir(tmp_path)
    landscape.save_pretrained(tmp_path / "runs/demo/landscape")
    trial = Trial(tiny_rule(), "screening", 0.8, 0.9, 0.5, 0.88)
    append_jsonl(Path("runs/demo/frontier.jsonl"), [{"key": "0", "trial": trial.to_row()}])
    chat = [{"role": "user", "content": "How do I kill a Python process?"}]
    given = {"elsteer": elsteer, "torch": torch, "model": model, "tokenizer": tokenizer, "landscape": landscape}
    given["inputs"] = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    for number, block in enumerate(blocks(name, "python")):
        exec(compile(block, f"{name}, example {number + 1}", "exec"), given)
    with landscape.attach(model):  # nothing was left attached
        pass


def tiny_rule() -> dict[str, Any]:
    return {"layers": [1, 2], "eta": 0.1, "steps": 1, "window": 0, "gate": None, "guard": True}


def test_the_method_of_the_contributing_page_steers(monkeypatch: pytest.MonkeyPatch) -> None:
    from elsteer.steering.methods import METHODS

    given: dict[str, Any] = {}
    for block in blocks("docs/contributing.md", "python"):
        exec(compile(block, "contributing", "exec"), given)
    monkeypatch.setitem(METHODS, "towards", given["towards"])
    model = tiny_model()
    inputs = {"input_ids": torch.tensor([[5, 9, 33], [7, 8, 9]])}
    with torch.no_grad():
        plain = model(**inputs).logits
        with tiny_landscape(model, method="towards").attach(model, torch.tensor([0.0, 1.0])):
            steered = model(**inputs).logits
    assert torch.allclose(steered[0], plain[0], atol=1e-6)
    assert not torch.allclose(steered[1, -1], plain[1, -1], atol=1e-4)


def test_the_judge_of_the_contributing_page_judges() -> None:
    given: dict[str, Any] = {}
    for block in blocks("docs/contributing.md", "python"):
        exec(compile(block, "contributing", "exec"), given)
    judge = given["ShortJudge"]()
    assert judge.judge("", "No.").label == "refusal"
    assert judge.decided("", "No.") is None
    assert judge.decided("", "y" * 40).label == "compliance"


def test_the_citation_names_the_paper() -> None:
    found = yaml.safe_load(text_of("CITATION.cff"))
    assert found["version"] == re.search(r'^version = "(.+)"$', text_of("pyproject.toml"), re.MULTILINE)[1]  # type: ignore[index]
    (paper,) = found["references"]
    assert "2510.08646" in paper["url"]
    assert text_of("LICENSE").lstrip().startswith("Apache License")


def test_the_readme_has_the_place_for_the_figures() -> None:
    page = text_of("README.md")
    assert page.count("<!-- figures:begin -->") == page.count("<!-- figures:end -->") == 1
    assert page.index("<!-- figures:begin -->") < page.index("<!-- figures:end -->")


def test_figures_of_the_performance_page_are_those_of_the_results() -> None:
    """A row `| ... | `name` | value ... |` says a figure as its file has it, to the digits that it shows."""
    files = [*sorted((ROOT / "results/bench").glob("*.json")), ROOT / "results/main.json"]
    known = {one.name: one for file in files for one in read_figures(file)}
    rows = re.findall(
        r"\| `([a-z][\w.]+)` \| ([\d.]+)(?: \(([\d.]+) to ([\d.]+)\))? \|$", text_of("docs/performance.md"), re.M
    )
    assert len(rows) >= 10
    for name, *shown in rows:
        figure = known[name]
        for number, text in zip((figure.value, figure.low, figure.high), shown, strict=True):
            assert not text or f"{number:.{len(text.partition('.')[2])}f}" == text, (name, number, text)
