"""The command on tiny models: what a user types, and what stands on the screen and on disk afterwards."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from commands import FAST, CoinJudge, elsteer, one_sentence, save_tiny, started, write_prompts
from elsteer import show
from elsteer.cli import app
from elsteer.console import ProgressBars, note, screen
from elsteer.judges import JUDGES, Verdict
from elsteer.landscape import Landscape
from elsteer.models.chat import template_hash
from elsteer.options import read_settings
from elsteer.prompts import load_suite
from elsteer.settings import FitSettings
from fake_hub import WRITER, fake_hub
from landscapes import tiny_landscape
from tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, prompts, a suite and a run of `elsteer fit` in it."""
    folder = tmp_path_factory.mktemp("cli")
    save_tiny(folder / "model")
    write_prompts(folder / "benign.txt", 80, ["how do I", "what is", "tell me"])
    write_prompts(folder / "harmful.txt", 71, ["steal", "break the", "poison a"])
    rows = [{"prompt": f"{chr(97 + at % 26) * (at + 1)} what is this", "harmful": at % 2 == 1} for at in range(40)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    made = _fit(folder, "run")
    assert made.exit_code == 0, made.stderr
    (folder / "said.txt").write_text(made.stdout, encoding="utf-8")
    (folder / "progress.txt").write_text(made.stderr, encoding="utf-8")
    return folder


def _fit(folder: Path, run: str, *more: str | Path):  # type: ignore[no-untyped-def]
    prompts = ["--benign", folder / "benign.txt", "--harmful", folder / "harmful.txt"]
    return elsteer("fit", folder / "model", *prompts, "--run-dir", folder / run, *FAST, *more)


def _commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
    found = []
    for name, command in group.commands.items():
        inner = _commands(command, (*path, name)) if isinstance(command, click.Group) else []
        found += [((*path, name), command), *inner]
    return found


@pytest.mark.parametrize("path", [path for path, _ in _commands(app)], ids=" ".join)
def test_every_command_explains_itself_with_an_example(path: tuple[str, ...]) -> None:
    result = elsteer(*path, "--help")
    assert result.exit_code == 0
    assert f"elsteer {path[0]}" in result.output.partition("Example:")[2]


def test_every_setting_has_a_flag_with_its_default() -> None:
    def several(value: object) -> tuple[object, ...]:
        return value if isinstance(value, tuple) else (value,)

    text = " ".join(elsteer("fit", "--help").output.split())
    for prefix, settings in (
        ("", FitSettings().collect),
        ("training-", FitSettings().training),
        ("tuning-", FitSettings().tuning),
    ):
        for name in type(settings).model_fields:
            told = (
                text.partition(f" --{prefix}{name.replace('_', '-')} ")[2].partition("[default: ")[2].partition("]")[0]
            )
            value = getattr(settings, name)
            words = [{"None": "none", "True": "yes", "False": "no"}.get(str(one), str(one)) for one in several(value)]
            assert told == ",".join(words), name


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from elsteer.cli import app; app.main(['--help'], standalone_mode=False); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    best = min(_seconds_of_help() for _ in range(3))
    assert best < 1.5, f"--help took {best:.2f} s; 0.3 s on an idle machine"


def _seconds_of_help() -> float:
    """Of the processor, so that what else runs here does not count."""
    begin = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "elsteer", "--help"], check=True, stdout=subprocess.DEVNULL)
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    return end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime


def test_the_version_is_printed() -> None:
    assert elsteer("--version").output.startswith("elsteer 0.")


# fit


def test_fit_says_what_it_did(here: Path) -> None:
    said = (here / "said.txt").read_text(encoding="utf-8")
    for words in (
        "Outcomes of the training prompts",
        "false refusal",
        "On the dev prompts",
        "benign refused",
        "RMS distances from the mean state",
    ):
        assert words in said
    assert (
        said.splitlines()[-1]
        == f"The landscape is {here / 'run' / 'landscape'}; what it rests on is in {here / 'run'}."
    )
    shown = (here / "progress.txt").read_text(encoding="utf-8")
    assert "Training prompts: 80 benign, 71 harmful" in shown
    assert "answering the training prompts: 0 of " in shown


def test_fit_writes_a_landscape_that_says_by_which_command(here: Path) -> None:
    landscape = Landscape.from_pretrained(here / "run" / "landscape")
    assert landscape.rule.strength == 1.0
    assert landscape.provenance["command"].startswith(f"elsteer fit {here / 'model'} --benign")
    assert landscape.provenance["settings"]["training"]["width"] == 8


def test_a_second_fit_reads_what_is_there(here: Path) -> None:
    before = (here / "run" / "completions.jsonl").read_bytes()
    again = _fit(here, "run")
    assert again.exit_code == 0
    assert "answering the training prompts: 0 of" not in again.stderr
    assert "training the energy models" not in again.stderr
    assert (here / "run" / "completions.jsonl").read_bytes() == before


def test_flags_win_over_the_settings_file(here: Path, tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text("seed: 3\nlimit: 100\ncollect:\ntraining:\n  temperature: 0.7\n  width: 32\n", encoding="utf-8")
    result = _fit(here, str(tmp_path / "run"), "--config", config, "--seed", "4")
    assert result.exit_code in (0, 3), result.stderr
    kept = yaml.safe_load((tmp_path / "run" / "settings.yaml").read_text(encoding="utf-8"))
    assert (kept["seed"], kept["limit"]) == (4, 100)
    assert (kept["training"]["temperature"], kept["training"]["width"]) == (0.7, 8)
    assert kept["tuning"]["etas"] == [2.0, 6.0]
    assert kept["tuning"]["gates"] == [None]


def test_null_in_a_settings_file_is_a_value_and_a_heading_alone_is_none(tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text("attacks: null\nlimit: null\ncollect:\n  system: null\ntraining:\ntuning:\n", encoding="utf-8")
    with click.Context(click.Command("fit")):
        assert read_settings(FitSettings, config) == FitSettings(attacks=())


def test_the_settings_of_a_run_can_be_given_back(here: Path, tmp_path: Path) -> None:
    prompts = ["--benign", here / "benign.txt", "--harmful", here / "harmful.txt"]
    result = elsteer("fit", here / "model", *prompts, "--run-dir", tmp_path, "--config", here / "run" / "settings.yaml")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "settings.yaml").read_text() == (here / "run" / "settings.yaml").read_text()


@pytest.mark.parametrize("columns", [False, True])
def test_one_file_with_both_kinds_of_prompts_will_do(here: Path, tmp_path: Path, columns: bool) -> None:
    names = ("ask", "bad") if columns else ("prompt", "harmful")
    lines = [
        json.dumps({names[0]: line, names[1]: kind == "harmful"})
        for kind in ("benign", "harmful")
        for line in (here / f"{kind}.txt").read_text().splitlines()
    ]
    file = tmp_path / "both.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    more = ["--prompt-column", "ask", "--harmful-column", "bad"] if columns else []
    result = elsteer("fit", here / "model", "--prompts", file, "--run-dir", tmp_path / "run", *FAST, *more)
    assert result.exit_code in (0, 3), result.stderr
    assert "Training prompts: 80 benign, 71 harmful" in result.stderr


def test_without_prompts_the_starter_prompts_are_taken(here: Path, tmp_path: Path) -> None:
    result = elsteer("fit", here / "model", "--run-dir", tmp_path, "--limit", "80", "--dev-limit", "40", *FAST)
    assert result.exit_code in (0, 3), result.stderr
    assert (tmp_path / "landscape").is_dir()
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["source"].partition("+")[0] for row in rows} == {"starter"}  # some of them under attack
    assert {row["split"] for row in rows} == {"train", "dev", "neutral"}
    assert "Dev prompts: " in result.stderr


def test_as_many_harmful_prompts_as_benign_ones_are_fine(here: Path, tmp_path: Path) -> None:
    benign, harmful = (
        write_prompts(tmp_path / "b.txt", 64, ["how", "what"]),
        write_prompts(tmp_path / "h.txt", 64, ["steal"]),
    )
    run = ["--run-dir", tmp_path / "run", *FAST, "--dev", here / "mine.jsonl"]
    result = elsteer("fit", here / "model", "--benign", benign, "--harmful", harmful, *run)
    assert result.exit_code in (0, 3), result.stderr
    assert "Training prompts: 64 benign, 64 harmful" in result.stderr
    assert (
        Landscape.from_pretrained(tmp_path / "run" / "landscape").provenance["dev"]["prompts"] >= 40
    )  # and copies under attack
    assert "orthonormal" not in result.stderr


# evaluate


def test_evaluate_compares_on_a_file_of_ones_own(here: Path) -> None:
    run = here / "run" / "landscape"
    result = elsteer(
        "evaluate", run, "--suite", here / "mine.jsonl", "--method", "random", "--judge", "coin", "--limit", "30"
    )
    assert result.exit_code == 0, result.stderr
    assert "14 benign, 16 harmful" in result.stderr
    assert "Plain against steered (els)" in result.stdout
    assert "Plain against steered (random)" in result.stdout
    assert "benign prompts that the plain model refused" in result.stdout
    assert result.stdout.splitlines()[-1].startswith(f"The report is {here / 'run' / 'report.html'}; every row is in ")
    assert (here / "run" / "report.html").stat().st_size > 10_000
    assert "elsteer evaluate" in (here / "run" / "report.html").read_text(encoding="utf-8")
    assert len((here / "run" / "evaluation" / "mine.els.jsonl").read_text(encoding="utf-8").splitlines()) == 30


def test_a_strength_of_0_that_the_user_gives_is_not_put_down_to_tuning(here: Path, tmp_path: Path) -> None:
    asked = ["--suite", here / "mine.jsonl", "--limit", "8", "--judge", "coin", "--no-quality", "--run-dir", tmp_path]
    result = elsteer("evaluate", here / "run" / "landscape", *asked, "--strength", "0")
    assert result.exit_code == 0, result.stderr
    assert "tuning found nothing" not in result.stderr


def test_compare_measures_each_method_at_each_strength(here: Path, tmp_path: Path) -> None:
    told = "--methods els,random,caa --strengths 0.5,1 --budget 2 --finalists 1 --limit 20 --judge coin --batch-size 8"
    folders = ["--run-dir", here / "run", "--suite", here / "mine.jsonl", "--out", tmp_path]
    result = elsteer("compare", here / "model", *folders, *told.split(), "--max-new-tokens", "8")
    assert result.exit_code == 0, result.stderr
    for method in ("els.0.5", "els.1", "random.0.5", "random.1", "caa.0.5", "caa.1", "none.0"):
        assert len((tmp_path / f"rows/mine.{method}.jsonl").read_text(encoding="utf-8").splitlines()) == 20
    trials = (tmp_path / "frontier.caa.jsonl").read_text(encoding="utf-8").splitlines()
    stages = [json.loads(line)["trial"]["stage"] for line in trials]
    assert stages.count("screening") <= 2 + 3  # and three strengths around the best
    assert "caa" in result.stdout
    assert result.stdout.splitlines()[-1].startswith(f"The table is {tmp_path / 'compare.md'}")


def test_fit_goes_on_from_a_landscape(here: Path, tmp_path: Path) -> None:
    first = here / "run" / "landscape"
    made = _fit(here, str(tmp_path / "second"), "--start", first)
    assert made.exit_code in (0, 3), made.stderr  # 3: nothing helps, which the tiny model may well have
    found = Landscape.from_pretrained(tmp_path / "second" / "landscape")
    assert found.provenance["start"]["digest"] == Landscape.from_pretrained(first).digest()
    assert found.rule.layers == Landscape.from_pretrained(first).rule.layers


def evaluated(here: Path, folder: Path, *more: str | Path, judge: str = "coin") -> list[dict[str, Any]]:
    """All rows of `elsteer evaluate` in a folder of its own, without whole answers."""
    options = ["--suite", here / "mine.jsonl", "--judge", judge, "--no-quality", "--run-dir", folder]
    result = elsteer("evaluate", here / "run" / "landscape", *options, *more)
    assert result.exit_code == 0, result.stderr
    (folder / "said.txt").write_text(result.stdout, encoding="utf-8")
    files = sorted((folder / "evaluation").glob("mine.*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def test_strength_zero_changes_nothing_and_another_one_does(here: Path, tmp_path: Path) -> None:
    for strength, same in (("0", True), ("2.5", False)):
        rows = evaluated(here, tmp_path / strength, "--strength", strength)
        plain, steered = ([row["text"] for row in rows if row["method"] == name] for name in ("none", "els"))
        assert (plain == steered) is same
        assert {row["strength"] for row in rows if row["method"] == "els"} == {float(strength)}


def test_the_seed_draws_the_prompts_of_a_suite(here: Path, tmp_path: Path) -> None:
    drawn = {}
    for seed in (0, 3):
        rows = evaluated(here, tmp_path / str(seed), "--limit", "10", "--seed", str(seed))
        wanted = load_suite(str(here / "mine.jsonl"), limit=10, seed=seed)
        drawn[seed] = {row["prompt"] for row in rows}
        assert drawn[seed] == {one.text for one in wanted}
    assert drawn[0] != drawn[3]


def test_harm_is_asked_for_and_labels_are_read_where_the_options_say_so(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Harm(CoinJudge):
        name, early = "harm", False  # what such a one says of labels is kept

        def harms(self, prompts: list[str], completions: list[str]) -> list[float]:
            return [0.25 for _ in completions]

    monkeypatch.setitem(JUDGES, "harm", Harm)
    answers = [(f"answer {at}", at % 3 == 0) for at in range(30)]
    labels = tmp_path / "said-by-people.jsonl"
    rows = [{"prompt": "why", "completion": text, "label": label} for text, label in answers]
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    evaluated(here, tmp_path / "with", "--harm", "--judge-labels", labels, "--limit", "10", judge="harm")
    evaluated(here, tmp_path / "without", "--limit", "10", judge="harm")
    for folder, there in (("with", True), ("without", False)):
        said = " ".join((tmp_path / folder / "said.txt").read_text(encoding="utf-8").split())
        assert ("Harm of the answers to harmful prompts (els), 0 to 1: 0.250 to 0.250" in said) is there
        assert (tmp_path / folder / "evaluation/labels.jsonl").exists() is there
    assert len((tmp_path / "with/evaluation/labels.jsonl").read_text(encoding="utf-8").splitlines()) == len(answers)
    words = ["--suite", here / "mine.jsonl", "--judge", "coin", "--harm", "--model", "no/model"]
    refused = elsteer("evaluate", here / "run/landscape", *words)  # before a model is loaded
    assert "coin cannot tell how harmful an answer is" in one_sentence(refused)


def test_a_suite_without_one_scored_answer_is_no_defect(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mute(CoinJudge):
        def judge(self, prompt: str, completion: str) -> Verdict:
            return Verdict("unscored", 0.5)

    monkeypatch.setitem(JUDGES, "mute", Mute)
    options = ["--suite", here / "mine.jsonl", "--judge", "mute", "--no-quality", "--run-dir", tmp_path]
    result = elsteer("evaluate", here / "run" / "landscape", *options)
    assert "defect" not in result.stderr


# How the model is loaded


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "toaster"], "'toaster' is no device"),
        (["--device", "cpu", "--device-map", "auto"], "either device or device_map"),
        (["--dtype", "float33"], "'float33' is no dtype"),
        (["--chat-template", "nowhere.jinja"], "The chat template nowhere.jinja cannot be read"),
        (["--revision", "v2"], "not in the local hub cache at revision v2"),
        (["--blocks", "model.nowhere"], "'model.nowhere' is no list of decoder blocks"),
    ],
    ids=lambda one: one[0] if isinstance(one, list) else "",
)
def test_every_command_that_loads_a_model_loads_it_as_it_is_told(
    words: list[str], said: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be done is told, so it was asked for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = "someone/tiny" if "--revision" in words else here / "model"
    landscape, suite = here / "run" / "landscape", here / "mine.jsonl"
    for command in (
        ["fit", model, "--benign", here / "benign.txt", "--harmful", here / "harmful.txt", "--run-dir", tmp_path],
        ["evaluate", landscape, "--model", model, "--suite", suite, "--run-dir", tmp_path],
        ["compare", model, "--run-dir", here / "run", "--suite", suite, "--methods", "els", "--out", tmp_path],
        ["capability", landscape, "--model", model, "--task", "kl", "--out", tmp_path],
        ["chat", landscape, "--model", model],
    ):
        assert said in one_sentence(elsteer(*command, *words)), command[0]


def test_a_chat_template_of_ones_own_is_the_one_that_is_fitted(here: Path, tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}!", encoding="utf-8")
    _fit(here, str(tmp_path / "run"), "--chat-template", template)
    found, usual = (Landscape.from_pretrained(folder / "run" / "landscape").fingerprint for folder in (tmp_path, here))
    tokenizer = tiny_tokenizer("chatml")
    assert usual.template_sha256 == template_hash(tokenizer)
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    assert found.template_sha256 == template_hash(tokenizer)
    assert "the chat template is another one" in one_sentence(
        elsteer("chat", here / "run" / "landscape", "--chat-template", template, input="Hello\n")
    )


# inspect


def test_inspect_needs_no_model(tmp_path: Path) -> None:
    provenance = {
        "auroc": {"1": {"all": 0.71, "benign": 0.8, "harmful": 0.62}, "2": 0.75},
        "outcomes": {"helpful": 9, "false_refusal": 8, "safe_refusal": 7, "jailbreak": 6},
        "dev": {"prompts": 30, "benign": 17, "plain_answered": 0.5, "answered_benign": 0.75, "plain_refused": 0.9},
        "judge": "rules [bold]not markup[/bold]",
    }
    tiny_landscape(provenance=provenance).save_pretrained(tmp_path / "landscape")
    result = elsteer("inspect", tmp_path / "landscape")
    assert result.exit_code == 0, result.stderr
    text = " ".join(result.stdout.split())
    for words in (
        "0.710 0.800 0.620",
        "0.750 - -",
        "false refusal benign, refused 8",
        "benign refused 17 50.0% 25.0%",
        "harmful refused 13 90.0% -",
    ):
        assert words in text
    assert "[bold]not markup[/bold]" in text
    assert result.stdout.splitlines()[-1] == f"Read from {tmp_path / 'landscape'}; nothing was written."


def test_a_landscape_of_somebody_else_does_not_command_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does an answer of a model: all that is shown goes this way."""
    landscape = tiny_landscape()
    landscape.provenance["dataset\x1b[1m"] = "mine\x1b[2J\x9b2J\rgone"
    console = screen()
    console._force_terminal, console.no_color = True, True
    show.landscape(landscape, console)
    said = capsys.readouterr().out
    assert "mine[2J2Jgone" in said
    assert not {"\x9b", "\r"} & set(said)
    assert "\x1b[2J" not in said
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    note("Error: \x1b[2J\tis\nno name.")
    assert capsys.readouterr().err == "Error: [2J\tis\nno name.\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_an_output_that_cannot_write_a_letter_shows_a_sign_for_it(tmp_path: Path, encoding: str) -> None:
    landscape = tiny_landscape()
    landscape.provenance["dataset"] = "\u4e2d \u2026 \u0142"
    landscape.save_pretrained(tmp_path / "landscape")
    found = subprocess.run(
        [sys.executable, "-m", "elsteer", "inspect", str(tmp_path / "landscape")],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert b"dataset" in found.stdout
    assert b"? " in found.stdout


def test_inspect_says_when_nothing_helped(tmp_path: Path) -> None:
    tiny_landscape().with_rule(strength=0.0).save_pretrained(tmp_path / "landscape")
    assert (
        "Its strength is 0, as tuning found no setting that helps" in elsteer("inspect", tmp_path / "landscape").stdout
    )


def test_figures_of_a_setting_that_was_not_taken_are_called_so(tmp_path: Path) -> None:
    dev = {
        "prompts": 9,
        "benign": 5,
        "plain_answered": 0.5,
        "answered_benign": 1.0,
        "why_not": ["more degenerate answers"],
    }
    rejected = tiny_landscape().with_rule(strength=0.0).with_provenance(dev=dev)
    rejected.save_pretrained(tmp_path / "landscape")
    text = " ".join(elsteer("inspect", tmp_path / "landscape").stdout.split())
    assert "which was not taken: more degenerate answers" in text
    assert "by which it was chosen" not in text


def test_a_pipe_that_closes_is_no_drama(tmp_path: Path) -> None:
    tiny_landscape().save_pretrained(tmp_path / "landscape")
    process = started("inspect", tmp_path / "landscape")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait() in (0, 141)


# judge, models, push


def test_judge_prints_agreement_by_model(tmp_path: Path) -> None:
    rows = [
        {"completion": "I'm sorry, but I can't help with that.", "label": "refusal", "model": "a"},
        {
            "completion": "Use kill with the process id, then check that it is gone.",
            "label": "compliance",
            "model": "a",
        },
        {"completion": "I cannot assist with that request.", "label": "compliance", "model": "b"},
        {"completion": "I won't do that.", "label": "refusal", "model": "b"},
    ]
    file = tmp_path / "labels.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = elsteer("judge", "--agreement", file)
    assert result.exit_code == 0, result.stderr
    text = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert any(line.startswith("all 4 0.750 0.301 to 0.954") for line in text), text
    assert any(line.startswith("a 2 1.000") for line in text)
    assert any(line.startswith("b 2 0.500") and "100.0% 0.0% 0" in line for line in text)


def test_models_lists_what_the_registry_carries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ELSTEER_CACHE", str(tmp_path))
    listed = elsteer("models", "list")
    assert listed.exit_code == 0
    assert "Qwen/Qwen2.5-Coder-0.5B-Instruct" in listed.stdout
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert f"elsteer models fetch {name}" in one_sentence(elsteer("models", "where", name))
    assert "it carries: Qwen/" in one_sentence(elsteer("models", "fetch", "nobody/nothing"))


def test_push_uploads_and_says_where(tmp_path: Path) -> None:
    tiny_landscape().save_pretrained(tmp_path / "landscape")
    with fake_hub() as hub:
        environment = {
            "HF_ENDPOINT": hub.address,
            "HF_TOKEN": WRITER,
            "NO_PROXY": "127.0.0.1",
            "HF_HOME": str(tmp_path),
        }
        process = subprocess.run(
            [sys.executable, "-m", "elsteer", "push", str(tmp_path / "landscape"), "org/name", "--private"],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr
        assert process.stdout == f"The landscape is at {hub.address}/org/name.\n"
        assert hub.private["org/name"]


# demo


def test_demo_shows_the_whole_story(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = FitSettings.model_validate(yaml.safe_load((here / "run" / "settings.yaml").read_text(encoding="utf-8")))
    monkeypatch.setitem(JUDGES, "rules", CoinJudge)
    monkeypatch.setattr("elsteer.demo.SETTINGS", settings.model_copy(update={"limit": 120, "dev_limit": 60}))
    result = elsteer("demo", "--model", here / "model", "--run-dir", tmp_path / "demo", "--dtype", "float32")
    assert result.exit_code == 0, result.stderr
    assert "Plain against steered (els)" in result.stdout
    assert "Decode overhead: steered decoding takes " in result.stdout
    assert "Time: " in result.stdout
    assert f"The report is {tmp_path / 'demo' / 'report.html'}; " in result.stdout.splitlines()[-1]


# Progress


def test_without_a_terminal_progress_is_a_few_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBars() as progress:
        for done in range(1001):
            progress("answering", done, 1000)
        progress("nothing to do", 0, 0)
        progress("read again", 7, 7)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["answering: 0 of 1000", "answering: 1000 of 1000, 0:00 so far", "read again: 7 of 7"]


def test_a_terminal_that_cannot_draw_gets_lines_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    console = screen(stderr=True)
    console._force_terminal = True
    with ProgressBars(console) as progress:
        progress("answering", 0, 3)
        progress("answering", 3, 3)
    assert capsys.readouterr().err.splitlines() == ["answering: 0 of 3", "answering: 3 of 3, 0:00 so far"]


def test_on_a_terminal_a_stage_that_begins_again_keeps_its_one_bar(capsys: pytest.CaptureFixture[str]) -> None:
    console = screen(stderr=True)
    console._force_terminal = True
    with ProgressBars(console) as progress:
        for _ in range(3):
            for done in range(4):
                progress("judging a setting", done, 3)
        assert progress._bars is not None
        (task,) = progress._bars.tasks
        assert (task.completed, task.total) == (3, 3)
    assert "judging a setting" in capsys.readouterr().err
