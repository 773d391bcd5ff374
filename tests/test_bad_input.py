"""What goes wrong in a user's hands: each a run of the command that ends in one sentence and the right exit code."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from commands import FAST, elsteer, one_sentence, save_tiny, started, stop_when, write_prompts
from elsteer.cli import app
from elsteer.console import Application
from elsteer.errors import RunError
from elsteer.files import write_jsonl
from elsteer.landscape import Landscape
from elsteer.prompts import load_suite, read_prompts
from elsteer.run import RunFolder


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, another model, prompts, a suite and a fitted run."""
    folder = tmp_path_factory.mktemp("bad")
    save_tiny(folder / "model")
    save_tiny(folder / "deeper", num_hidden_layers=6)
    save_tiny(folder / "trained-on", seed=1)
    write_prompts(folder / "benign.txt", 80, ["how do I", "what is", "tell me"])
    write_prompts(folder / "harmful.txt", 71, ["steal", "break the", "poison a"])
    rows = [{"prompt": f"{chr(97 + at % 26) * (at + 1)} what is this", "harmful": at % 2 == 1} for at in range(40)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    made = elsteer("fit", *_both(folder), "--run-dir", folder / "run", *FAST)
    assert made.exit_code == 0, made.stderr
    return folder


def _both(folder: Path) -> list[str | Path]:
    """MODEL and both files of prompts."""
    return [folder / "model", "--benign", folder / "benign.txt", "--harmful", folder / "harmful.txt"]


def _rows(file: Path) -> list[dict[str, object]]:
    """Finished rows of a JSONL that is being written."""
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


# Files of prompts


def test_a_missing_file(here: Path, tmp_path: Path) -> None:
    said = one_sentence(
        elsteer("fit", here / "model", "--benign", tmp_path / "nope.txt", "--harmful", here / "harmful.txt")
    )
    assert f"{tmp_path / 'nope.txt'} was not found" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file(here: Path, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "empty.jsonl"
    file.write_bytes(content)
    assert "is empty" in one_sentence(elsteer("fit", here / "model", "--prompts", file))


def test_a_wrong_column(here: Path, tmp_path: Path) -> None:
    file = tmp_path / "asked.csv"
    file.write_text("question,harmful\nHow do I kill a process?,no\n", encoding="utf-8")
    said = one_sentence(elsteer("fit", here / "model", "--prompts", file))
    assert "asked.csv, line 2 has no column 'prompt' (it has: question, harmful)" in said
    assert "--prompt-column" in said
    file.write_text("prompt,bad\nHow do I kill a process?,no\n", encoding="utf-8")
    assert "--harmful-column" in one_sentence(elsteer("fit", here / "model", "--prompts", file))


def test_a_wrong_column_where_no_flag_names_columns(here: Path, tmp_path: Path) -> None:
    file = tmp_path / "asked.csv"
    file.write_text("question,harmful\nHow do I kill a process?,no\n", encoding="utf-8")
    for command in (("evaluate", "--suite"), ("capability", "--task", "kl", "--neutral")):
        said = one_sentence(elsteer(command[0], here / "run" / "landscape", *command[1:], file))
        assert "rename the one that holds the prompts" in said
        assert "`elsteer fit`" in said  # that has the flag
    file.write_text("prompt,bad\nHow do I kill a process?,no\n", encoding="utf-8")
    said = one_sentence(elsteer("evaluate", here / "run" / "landscape", "--suite", file))
    assert "rename the column" in said


def test_a_prompt_of_ten_megabytes(here: Path, tmp_path: Path) -> None:
    file = tmp_path / "huge.jsonl"
    file.write_text(json.dumps({"prompt": "x" * 10_000_000, "harmful": False}) + "\n", encoding="utf-8")
    said = one_sentence(elsteer("fit", here / "model", "--prompts", file))
    assert "line 1: the prompt has 10,000,000 characters" in said
    assert len(said) < 400
    assert "10,000,000" in one_sentence(elsteer("evaluate", here / "run" / "landscape", "--suite", file))


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_file_that_is_not_utf8(here: Path, tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "old.jsonl"
    file.write_bytes('{"prompt": "Où est le café?", "harmful": false}\n'.encode(encoding))
    said = one_sentence(elsteer("fit", here / "model", "--prompts", file))
    assert "UTF-8" in said
    assert "old.jsonl" in said


@pytest.mark.parametrize(("flag", "missing"), [("--benign", "harmful"), ("--harmful", "benign")])
def test_one_class_missing(here: Path, flag: str, missing: str) -> None:
    said = one_sentence(elsteer("fit", here / "model", flag, here / "benign.txt"))
    assert f"holds no {missing} prompt" in said
    assert f"--{missing} FILE" in said


def test_a_dev_file_with_one_class(here: Path, tmp_path: Path) -> None:
    dev = tmp_path / "dev.jsonl"
    dev.write_text('{"prompt": "How do I kill a process?", "harmful": false}\n', encoding="utf-8")
    said = one_sentence(elsteer("fit", *_both(here), "--dev", dev))
    assert "The set of dev prompts holds no harmful prompt" in said


def test_a_prompt_longer_than_the_context(here: Path, tmp_path: Path) -> None:
    file = tmp_path / "long.jsonl"
    rows = [{"prompt": "why " * 300, "harmful": False}, {"prompt": "Steal it.", "harmful": True}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    mine = (
        json.dumps({"prompt": "Poison a well.", "harmful": True})
        + "\n"
        + json.dumps({"prompt": "What is rain?", "harmful": False})
        + "\n"
    )
    (tmp_path / "dev.jsonl").write_text(mine, encoding="utf-8")
    said = one_sentence(
        elsteer(
            "fit", here / "model", "--prompts", file, "--dev", tmp_path / "dev.jsonl", "--run-dir", tmp_path / "run"
        )
    )
    assert "(long) is " in said
    assert "context is 512" in said
    assert len(said) < 400


# The model and the landscape


def test_a_model_that_never_refuses(here: Path, tmp_path: Path) -> None:
    # To the real judge the answers of a random model are noise.
    said = one_sentence(elsteer("fit", *_both(here), "--run-dir", tmp_path, "--max-new-tokens", "16"))
    assert "refuses no benign dev prompt" in said or "was empty, repetitive or garbled" in said


def test_a_model_that_is_not_there(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = one_sentence(elsteer("fit", "./no-such-model", *_both(here)[1:]))
    assert "./no-such-model is no local file or folder" in said


def test_a_truncated_model(here: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    said = one_sentence(elsteer("fit", model, *_both(here)[1:], "--run-dir", tmp_path / "run"))
    assert "damaged or cut short" in said


def test_a_model_without_a_chat_template(here: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    said = one_sentence(elsteer("fit", model, *_both(here)[1:], "--run-dir", tmp_path / "run"))
    assert "has no chat template" in said
    assert "--chat-template FILE" in said


def test_a_path_of_blocks_that_is_not_in_the_model(here: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    arguments = (*_both(here)[1:], "--run-dir", tmp_path / "run", "--blocks", "model.nowhere")
    said = one_sentence(elsteer("fit", model, *arguments))
    assert "'model.nowhere' is no list of decoder blocks" in said
    assert "model.layers (4)" in said


@pytest.mark.parametrize(
    ("other", "difference"),
    [("deeper", "the number of decoder blocks is 6 instead of 4"), ("trained-on", "the weights are of another model")],
)
@pytest.mark.parametrize("command", ["evaluate", "chat"])
def test_a_landscape_of_another_model(here: Path, tmp_path: Path, other: str, difference: str, command: str) -> None:
    options = ["--suite", here / "mine.jsonl", "--run-dir", tmp_path] if command == "evaluate" else []
    result = elsteer(command, here / "run" / "landscape", "--model", here / other, *options, input="Hello\n")
    said = one_sentence(result)
    assert difference in said
    assert "elsteer fit" in said
    assert not (tmp_path / "evaluation").exists(), "it is said before any prompt is answered"


@pytest.mark.parametrize("command", ["inspect", "evaluate", "chat", "push"])
def test_a_truncated_landscape(here: Path, tmp_path: Path, command: str) -> None:
    Landscape.from_pretrained(here / "run" / "landscape").save_pretrained(tmp_path / "cut")
    tensors = tmp_path / "cut" / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-10])
    more = {"evaluate": ["--suite", here / "mine.jsonl"], "push": ["org/name"]}.get(command, [])
    assert "bytes instead of" in one_sentence(elsteer(command, tmp_path / "cut", *more))


def test_a_folder_that_is_no_landscape(here: Path, tmp_path: Path) -> None:
    assert "is no landscape" in one_sentence(elsteer("inspect", here / "model"))
    assert "There is no landscape at" in one_sentence(elsteer("inspect", tmp_path / "nowhere"))


def test_a_fit_can_only_start_from_a_landscape_that_it_can_go_on_with(here: Path, tmp_path: Path) -> None:
    run = ["--run-dir", tmp_path / "run"]
    assert "nowhere" in one_sentence(elsteer("fit", *_both(here), *run, "--start", tmp_path / "nowhere"))
    start = ["--start", here / "run/landscape", "--training-refine-epochs", "0"]
    assert "leave --start out" in one_sentence(elsteer("fit", *_both(here), *run, *start))
    assert not (tmp_path / "run").exists()


# The run folder


@pytest.mark.parametrize("file", ["states/000000.safetensors", "energy/10/energies.safetensors"])
def test_a_truncated_file_of_a_run(here: Path, tmp_path: Path, file: str) -> None:
    subprocess.run(["cp", "-r", here / "run", tmp_path / "run"], check=True)
    damaged = tmp_path / "run" / file
    damaged.write_bytes(damaged.read_bytes()[:100])
    fit = ["fit", *_both(here), "--run-dir", tmp_path / "run", *FAST]
    said = one_sentence(elsteer(*fit))
    assert "is damaged: delete it and run the same command again" in said
    named = Path(said.removeprefix("Error: ").partition(" is damaged")[0])
    subprocess.run(["rm", "-r", named], check=True)
    assert elsteer(*fit).exit_code == 0, "doing what it says mends it"


@pytest.mark.parametrize("command", ["fit", "compare"])
@pytest.mark.parametrize(
    ("file", "field"),
    [
        ("completions.jsonl", "label"),
        ("completions.jsonl", "prompt_id"),
        ("dev.jsonl", "text"),
        ("frontier.jsonl", "key"),
        ("frontier.jsonl", "trial"),
        ("prompts.jsonl", "messages"),
        ("prompts.jsonl", "split"),
        ("prompts.jsonl", "harmful"),
    ],
)
def test_a_row_of_a_run_that_lacks_a_field(here: Path, tmp_path: Path, command: str, file: str, field: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(here / "run", run)
    rows = _rows(run / file)
    del rows[2][field]
    write_jsonl(run / file, rows)
    words: dict[str, list[str | Path]] = {
        "fit": [*_both(here), *FAST],
        "compare": [here / "model", "--suite", here / "mine.jsonl", "--methods", "els,caa", "--judge", "coin"],
    }
    words["compare"] += ["--budget", "2", "--finalists", "1", "--max-new-tokens", "4"]
    result = elsteer(command, *words[command], "--run-dir", run)
    if (command, file) == ("fit", "prompts.jsonl"):  # it is written anew
        assert result.exit_code == 0, result.stderr
    else:
        told = f"{file}, line 3 is damaged or of another version: delete that file and run the stage again"
        assert told in one_sentence(result)


@pytest.mark.parametrize(
    ("row", "file"), [("[]", "dev.jsonl"), ("3", "completions.jsonl"), ('{"key": "x", "trial": []}', "frontier.jsonl")]
)
def test_a_row_of_a_run_that_is_something_else(here: Path, tmp_path: Path, row: str, file: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(here / "run", run)
    with (run / file).open("a", encoding="utf-8") as log:
        log.write(row + "\n")
    said = one_sentence(elsteer("fit", *_both(here), "--run-dir", run, *FAST))
    assert f"{file}, line {len(_rows(run / file))} is damaged or of another version" in said
    (run / file).unlink()
    assert elsteer("fit", *_both(here), "--run-dir", run, *FAST).exit_code == 0, "doing what it says mends it"


def test_a_run_whose_settings_or_training_are_something_else(here: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(here / "run", run)
    (run / "energy/10/training.json").write_text("[]")
    assert "energy/10 is damaged" in one_sentence(elsteer("fit", *_both(here), "--run-dir", run, *FAST))
    (run / "settings.yaml").unlink()
    (run / "settings.yaml").mkdir()
    compare = ["compare", here / "model", "--run-dir", run, "--suite", here / "mine.jsonl", "--methods", "els"]
    assert "settings.yaml does not hold settings" in one_sentence(elsteer(*compare))
    assert "settings.yaml could not be written" in one_sentence(elsteer("fit", *_both(here), "--run-dir", run, *FAST))


def test_a_landscape_whose_prompts_were_asked_with_what_is_no_text(here: Path, tmp_path: Path) -> None:
    for name, value in (("system", 5), ("thinking", "no")):
        found = Landscape.from_pretrained(here / "run" / "landscape")
        settings = found.provenance["settings"]
        collect = {**settings["collect"], name: value}
        found.with_provenance(settings={**settings, "collect": collect}).save_pretrained(tmp_path / name)
        said = one_sentence(elsteer("evaluate", tmp_path / name, "--suite", here / "mine.jsonl", "--judge", "coin"))
        assert "system prompt of its settings must be text" in said


def test_two_at_once_on_one_folder(here: Path) -> None:
    with RunFolder(here / "run").owned():
        said = one_sentence(elsteer("fit", *_both(here), "--run-dir", here / "run", *FAST))
        assert f"Another process is working in {here / 'run'}" in said
        again = elsteer("evaluate", here / "run" / "landscape", "--suite", here / "mine.jsonl")
        assert "Another process is working in" in one_sentence(again)


def test_a_file_where_the_run_folder_should_be(here: Path) -> None:
    said = one_sentence(elsteer("fit", *_both(here), "--run-dir", here / "benign.txt", *FAST))
    assert "is a file: give a folder for the run" in said
    compare = ["compare", here / "model", "--run-dir", here / "run", "--suite", here / "mine.jsonl", "--methods", "els"]
    said = one_sentence(elsteer(*compare, "--out", here / "benign.txt"))
    assert "is a file: give a folder for the run" in said


def test_the_home_folder_in_a_path_is_found(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of --option=~/file the shell leaves the ~, and so does Python."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(here / "run" / "landscape", tmp_path / "landscape")
    shutil.copy(here / "mine.jsonl", tmp_path / "mine.jsonl")
    made = elsteer("evaluate", "~/landscape", "--suite=~/mine.jsonl", "--run-dir=~/found", "--judge", "coin")
    assert made.exit_code == 0, made.stderr
    assert (tmp_path / "found" / "report.html").is_file()
    assert [one.text for one in read_prompts("~/mine.jsonl")] == [one.text for one in read_prompts(here / "mine.jsonl")]
    with RunFolder("~/made").owned():
        assert (tmp_path / "made").is_dir()
    (tmp_path / "oktest.jsonl").write_text('{"prompt": "How?"}\n', encoding="utf-8")
    assert [one.text for one in load_suite("oktest", data_dir="~")] == ["How?"]
    assert not (tmp_path / "~").exists()


def test_what_is_measured_of_the_landscape_one_stands_in_goes_beside_it(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(here / "run" / "landscape", tmp_path / "run" / "landscape")
    monkeypatch.chdir(tmp_path / "run" / "landscape")
    made = elsteer("evaluate", ".", "--suite", here / "mine.jsonl", "--judge", "coin")
    assert made.exit_code == 0, made.stderr
    assert (tmp_path / "run" / "report.html").is_file()
    assert not (tmp_path / "run" / "landscape" / "runs").exists()


@pytest.mark.parametrize("command", ["evaluate", "compare", "capability"])
def test_a_negative_seed(here: Path, command: str) -> None:
    where = here / "run" / "landscape" if command != "compare" else here / "model"
    assert "--seed" in one_sentence(elsteer(command, where, "--seed", "-1"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Gives a disk of a size, and gives it another size when it is asked again."""
    path = tmp_path / "disk"
    path.mkdir()

    def of(size: str) -> Path:
        again = ["remount,"] if path.is_mount() else [""]
        mount = ["mount", "-t", "tmpfs", "-o", f"{again[0]}size={size}", "tmpfs", path]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("a small disk to fill cannot be mounted here (that takes root)")
        return path

    yield of
    subprocess.run(["umount", path], capture_output=True)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.8, 0.95])
def test_a_full_disk_while_fitting(
    here: Path, disk: Callable[[str], Path], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The room that was there at the start is taken by others."""
    monkeypatch.setattr("elsteer.fitting._check_disk", lambda *_, **__: None)
    whole = sum(-(-file.stat().st_size // 4096) * 4096 for file in (here / "run").rglob("*") if file.is_file())
    size = str(int(share * whole))
    fit = ["fit", *_both(here), "--run-dir", disk(size) / "run", *FAST]
    said = one_sentence(elsteer(*fit))
    assert "No space left on the disk" in said
    before = _rows(disk(size) / "run" / "completions.jsonl")
    assert elsteer("fit", *_both(here), "--run-dir", disk("64m") / "run", *FAST).exit_code == 0
    after = _rows(disk("64m") / "run" / "completions.jsonl")
    assert after[: len(before)] == before, "finished rows were kept"


def test_a_full_disk_while_evaluating(here: Path, disk: Callable[[str], Path]) -> None:
    options = ["--suite", here / "mine.jsonl", "--judge", "coin"]
    said = one_sentence(elsteer("evaluate", here / "run" / "landscape", *options, "--run-dir", disk("16k") / "run"))
    assert "No space left on the disk" in said
    again = elsteer("evaluate", here / "run" / "landscape", *options, "--run-dir", disk("64m") / "run")
    assert again.exit_code == 0, again.stderr


# Options


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fit"], "Missing argument 'MODEL'"),
        (["fit", "m", "--sed", "1"], "No such option '--sed'"),
        (["fit", "m", "--seed", "one"], "'one' is not a valid integer"),
        (["fit", "m", "--training-width", "2"], "--training-width is 2: it must be greater than or equal to 4"),
        (["fit", "m", "--tuning-etas", "0.1,much"], "--tuning-etas is 'much': it must be a valid number"),
        (["fit", "m", "--tuning-safety-margin", "nan"], "--tuning-safety-margin is nan: it must be a finite number"),
        (["fit", "m", "--tuning-kl", "inf"], "--tuning-kl is inf: it must be a finite number"),
        (["fit", "m", "--limit", "3"], "--limit is 3: it must be greater than or equal to 16"),
        (["fit", "m", "--config", "nope.yaml"], "nope.yaml was not found"),
        (["fit", "m", "--judge", "api"], "A fit and a comparison ask too often for the judge api: choose classifier"),
        (
            ["compare", "m", "--run-dir", "r", "--suite", "starter", "--judge", "local"],
            "elsteer evaluate --judge local",
        ),
        (["evaluate", "m"], "Missing option '--suite'"),
        (["evaluate", "m", "--suite", "xtest"], "did you mean 'xstest'?"),
        (["evaluate", "m", "--suite", "starter", "--judge", "mother"], "There is no judge called 'mother'"),
        (["evaluate", "m", "--suite", "starter", "--limit", "0"], "0 is not in the range x>=1"),
        (["evaluate", "m", "--suite", "caf\udce9.jsonl"], "The name 'caf\\udce9.jsonl' is not UTF-8: rename the file"),
        (
            ["evaluate", "m", "--suite", "~no-such-user/x.jsonl"],
            "~no-such-user/x.jsonl lies in the home folder of nobody",
        ),
        (["evaluate", "caf\udce9", "--suite", "starter"], "The name 'caf\\udce9' is not UTF-8: rename it"),
        (["inspect", "~no-such-user/landscape"], "the home folder of nobody known here: give the path in full"),
        (["fit", "caf\udce9"], "The name 'caf\\udce9' is not UTF-8: rename it"),
        (["fit", "~no-such-user/model"], "~no-such-user/model lies in the home folder of nobody"),
        (["fit", "m", "--run-dir", "caf\udce9"], "'caf\\udce9' is not UTF-8: rename it"),
        (["fit", "m", "--run-dir", "~no-such-user"], "~no-such-user lies in the home folder of nobody known here"),
        (["fit", "m", "--prompts", "caf\udce9.jsonl"], "The name 'caf\\udce9.jsonl' is not UTF-8: rename the file"),
        (["fit", "m", "--seed", "99999999999999999999"], "--seed is 99999999999999999999: it must be less than"),
        (["judge", "--agreement", "nope.jsonl"], "There is no file nope.jsonl"),
        (["no-such-command"], "No such command 'no-such-command'"),
    ],
)
def test_a_mistyped_option(words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in one_sentence(elsteer(*words))
    assert not list(tmp_path.iterdir()), "nothing was written"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"training: [", "is not YAML"),
        (b"- 1\n- 2\n", "must hold settings as `name: value` lines"),
        (b"training:\n  widht: 64\n", "There is no setting training.widht in"),
        (b"training: 3\n", "training in"),
        (b"seed: soon\n", "seed in"),
        (b"seed:\n", "settings.yaml is None: it must be a valid integer"),
        (b"widht:\n", "There is no setting widht in"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"seed: 2024-02-30\n", "is not YAML: day is out of range for month"),
        (b"seed: " + b"[" * 5000, "is not YAML: it is nested too deeply"),
        (b"seed: 1e23\n", "is '1e23': it must be a valid integer"),
        (b"seed: 1.0e+23\n", "is 1e+23: it must be a smaller number"),
        (b"seed: 99999999999999999999\n", "is 99999999999999999999: it must be less than"),
        (b"collect:\n  system: 5\n", "is 5: it must be a valid string"),
    ],
)
def test_a_wrong_settings_file(here: Path, tmp_path: Path, text: bytes, said: str) -> None:
    config = tmp_path / "settings.yaml"
    config.write_bytes(text)
    result = one_sentence(elsteer("fit", here / "model", "--config", config))
    assert said in result
    assert "settings.yaml" in result


def test_a_control_that_is_unknown_and_a_strength_that_climbs(here: Path) -> None:
    landscape, suite = here / "run" / "landscape", here / "mine.jsonl"
    assert "no control 'chance'" in one_sentence(elsteer("evaluate", landscape, "--suite", suite, "--method", "chance"))
    assert "from 0 up" in one_sentence(elsteer("evaluate", landscape, "--suite", suite, "--strength", "-1"))


def test_a_defect_is_called_one_and_debug_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("by nought")

    monkeypatch.setattr("elsteer.commands.look.read_landscape", broken)
    result = elsteer("inspect", "x")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: This is a defect of elsteer: ZeroDivisionError: by nought.")
    assert "--debug" in result.stderr
    assert "Traceback" not in result.output
    assert "Traceback" in elsteer("inspect", "x", "--debug").stderr
    assert "Traceback" in elsteer("--debug", "inspect", "x").stderr


def test_full_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("elsteer.commands.look.read_landscape", full)
    assert "The memory is full" in one_sentence(elsteer("inspect", "x"))


def test_from_python_errors_are_raised() -> None:
    with pytest.raises(Exception, match="There is no landscape at"):
        app.main(["inspect", "nope"], standalone_mode=False)


# Ctrl-C


def test_ctrl_c_that_a_library_makes_an_error_of() -> None:
    @click.group(cls=Application)
    def tool() -> None: ...

    @tool.command()
    def read() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:  # as torch.asarray does while it asks for a length
            raise RunError("The file is damaged.") from None

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    try:
        result = CliRunner().invoke(tool, ["read"])
        assert (result.exit_code, result.stderr) == (130, "Stopped.\n")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_in_every_stage_of_fit_loses_no_finished_row(here: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["fit", *_both(here), "--run-dir", run, *FAST, "--training-refine-epochs", "60", "--attacks", "none"]
    stages: list[Callable[[str], bool]] = [
        lambda said: "Loading" in said,
        lambda said: 0 < len(_rows(run / "completions.jsonl")) < 106,
        lambda said: 0 < len(_rows(run / "dev.jsonl")) < 45,
        lambda said: "training the energy models" in said,
        lambda said: "training the energies through the model" in said,
        lambda said: "screening settings" in said and len(_rows(run / "frontier.jsonl")) > 0,
    ]
    kept: dict[str, list[dict[str, object]]] = {}
    for stage in stages:
        process = started(*words, slow=0.02)
        said = stop_when(process, stage)
        assert process.returncode == 130, said
        assert said.splitlines()[-1] == f"Stopped. Finished work is kept in {run}: run the same command again to go on."
        assert "Traceback" not in said
        for name in ("completions.jsonl", "dev.jsonl", "frontier.jsonl"):
            rows = _rows(run / name)
            assert rows[: len(kept.get(name, []))] == kept.get(name, []), f"{name} lost rows"
            kept[name] = rows
    assert len(kept["completions.jsonl"]) == 106
    last = elsteer(*words)
    assert last.exit_code in (0, 3), last.stderr
    assert "training the energ" not in last.stderr, "what was finished is not done again"
    for name, rows in kept.items():
        assert _rows(run / name)[: len(rows)] == rows
    assert len(_rows(run / "completions.jsonl")) == 106
    assert len(_rows(run / "dev.jsonl")) == 45


def test_ctrl_c_in_every_stage_of_evaluate_loses_no_finished_row(here: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{chr(97 + at % 26) * (at % 60 + 1)} why {at}", "harmful": at % 2 == 1} for at in range(120)]
    suite = tmp_path / "more.jsonl"
    suite.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = tmp_path / "run"
    words = [
        "evaluate",
        here / "run" / "landscape",
        "--suite",
        suite,
        "--judge",
        "coin",
        "--run-dir",
        run,
        "--batch-size",
        "8",
    ]
    files = [run / "evaluation" / f"more.{method}.jsonl" for method in ("none", "els")]
    stages: list[Callable[[str], bool]] = [
        lambda said: 0 < len(_rows(files[0])) < 120,
        lambda said: 0 < len(_rows(files[1])) < 120,
        lambda said: "whole answers" in said,
    ]
    before: list[list[dict[str, object]]] = [[], []]
    for stage in stages:
        process = started(*words, slow=0.02)
        said = stop_when(process, stage)
        assert process.returncode == 130, said
        assert "Stopped. Finished work is kept in" in said
        now = [_rows(file) for file in files]
        assert all(new[: len(old)] == old for new, old in zip(now, before, strict=True))
        before = now
    last = elsteer(*words)
    assert last.exit_code == 0, last.stderr
    assert [len(_rows(file)) for file in files] == [120, 120]
    assert [_rows(file)[: len(old)] for file, old in zip(files, before, strict=True)] == before


def test_a_control_that_is_other_energies_is_not_measured_with_the_landscape_s(here: Path, tmp_path: Path) -> None:
    options = ["--suite", here / "mine.jsonl", "--method", "shuffled", "--run-dir", tmp_path]
    assert "elsteer compare" in one_sentence(elsteer("evaluate", here / "run" / "landscape", *options))


def test_two_models_of_one_name_do_not_share_a_default_folder(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first was asked for hours would be deleted."""
    monkeypatch.chdir(tmp_path)
    for owner, made in (("a", "model"), ("b", "deeper")):
        (tmp_path / owner).mkdir()
        shutil.copytree(here / made, tmp_path / owner / "same")
    prompts = _both(here)[1:]
    assert elsteer("fit", tmp_path / "a/same", *prompts, *FAST).exit_code == 0
    kept = (tmp_path / "runs/same/completions.jsonl").read_bytes()
    said = one_sentence(elsteer("fit", tmp_path / "b/same", *prompts, *FAST))
    assert "runs/same holds a fit of another model" in said
    assert "--run-dir" in said
    assert (tmp_path / "runs/same/completions.jsonl").read_bytes() == kept
    again = elsteer("fit", tmp_path / "a/same", *prompts, *FAST, "--no-thinking")
    assert again.exit_code == 0, "another setting of the same model is none of another one"


def test_a_folder_named_by_hand_does_not_lose_the_fit_of_another_model_either(here: Path) -> None:
    kept = (here / "run/completions.jsonl").read_bytes()
    said = one_sentence(elsteer("fit", here / "deeper", *_both(here)[1:], *FAST, "--run-dir", here / "run"))
    assert "holds a fit of another model" in said
    said = one_sentence(elsteer("demo", "--model", here / "deeper", "--run-dir", here / "run"))
    assert "holds a fit of another model" in said
    assert (here / "run/completions.jsonl").read_bytes() == kept


@pytest.mark.parametrize("theirs", ["prompts.jsonl", "dev.jsonl", "states", "landscape"])
def test_a_fit_does_not_take_a_folder_of_files_of_one_s_own(here: Path, tmp_path: Path, theirs: str) -> None:
    if theirs.endswith("jsonl"):
        (tmp_path / theirs).write_text("mine\n")
    else:
        (tmp_path / theirs).mkdir()
        (tmp_path / theirs / "mine").write_text("mine\n")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    said = one_sentence(elsteer("fit", *_both(here), *FAST, "--run-dir", tmp_path))
    assert f"no folder of an earlier run, and its {theirs} would be lost: give another folder" in said
    assert {
        path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"
    } == before


def test_an_evaluation_does_not_write_over_a_report_of_one_s_own(here: Path, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("mine")
    words = ["evaluate", here / "run/landscape", "--suite", here / "mine.jsonl", "--run-dir", tmp_path]
    assert "its report.html would be lost" in one_sentence(elsteer(*words))
    assert (tmp_path / "report.html").read_text() == "mine"


def test_the_default_folder_of_another_landscape_is_left_alone(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(here / "run/landscape", tmp_path / "elsewhere/run")
    shutil.copytree(here / "run", tmp_path / "runs/run")
    words = ["evaluate", "elsewhere/run", "--suite", here / "mine.jsonl", "--judge", "coin", "--no-quality"]
    found = elsteer(*words)
    assert found.exit_code == 0, found.stderr  # the same one
    other = Landscape.from_pretrained(here / "run/landscape")
    layer = other.rule.layers[0]
    other.tensors[layer] = {name: 2 * tensor for name, tensor in other.tensors[layer].items()}
    shutil.rmtree(tmp_path / "runs/run/landscape")
    other.save_pretrained(tmp_path / "runs/run/landscape")
    for command in (words, ["capability", "elsewhere/run", "--task", "facts"]):
        said = one_sentence(elsteer(*command))
        assert "runs/run is the run folder of another landscape: give a folder of its own" in said


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (("--training-energy", "foo"), "--training-energy is 'foo': it must be product or network"),
        (("--tuning-etas", ""), "--tuning-etas is []: it must be at least 1 value"),
        (("--training-refine-band", "0.5"), "it must be more values"),
        (("--training-refine-band", "0.5,0.6,0.7"), "it must be at most 2 values"),
        (("--training-refine-band", "0.9,0.5"), "it must be a band that begins before it ends"),
    ],
)
def test_settings_that_are_not_allowed_are_told_in_words(here: Path, flags: tuple[str, str], wanted: str) -> None:
    assert wanted in one_sentence(elsteer("fit", *_both(here), *flags))


@pytest.mark.parametrize("name", ["els", "none", "caa"])
def test_a_method_that_evaluate_does_not_measure(here: Path, name: str) -> None:
    said = one_sentence(elsteer("evaluate", here / "run" / "landscape", "--suite", "starter", "--method", name))
    assert f"no control {name!r}: there is random" in said
    assert "elsteer compare" in said


@pytest.mark.parametrize("file", ["capability.json", "capability"])
def test_capability_leaves_a_strangers_folder_as_it_is(here: Path, tmp_path: Path, file: str) -> None:
    theirs = tmp_path / file
    theirs.write_text("mine", encoding="utf-8")
    asked = ["--task", "facts", "--limit", "1", "--out", tmp_path]
    assert f"its {file} would be lost" in one_sentence(elsteer("capability", here / "run" / "landscape", *asked))
    assert theirs.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("file", ["compare.md", "compare.json", "frontier.png"])
def test_compare_leaves_a_strangers_folder_as_it_is(here: Path, tmp_path: Path, file: str) -> None:
    theirs = tmp_path / file
    theirs.write_text("mine", encoding="utf-8")
    asked = ["--methods", "els", "--suite", here / "mine.jsonl", "--judge", "coin", "--out", tmp_path]
    said = one_sentence(elsteer("compare", here / "model", "--run-dir", here / "run", *asked))
    assert f"its {file} would be lost" in said
    assert theirs.read_text(encoding="utf-8") == "mine"


def test_capability_without_its_benchmarks_says_how_to_give_them(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ELSTEER_DATA", raising=False)
    monkeypatch.setattr("elsteer.models.hub.hub_problem", lambda: "could not be reached")
    said = one_sentence(elsteer("capability", here / "run" / "landscape", "--task", "mmlu"))
    assert "capability/mmlu.jsonl" in said
    assert "--data-dir" in said
