"""The run folder: one owner at a time, and stages that are done again only when what they rest on changed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from elsteer.errors import RunError
from elsteer.files import write_atomic, write_jsonl
from elsteer.models import elsteer_cache
from elsteer.prompts import Prompt
from elsteer.run import RunFolder, key_of, told_apart, without_nan


def test_the_second_process_is_told_that_the_folder_is_taken(tmp_path: Path) -> None:
    script = f"from elsteer.run import RunFolder\nwith RunFolder({str(tmp_path)!r}).owned(): pass"
    with RunFolder(tmp_path).owned():
        second = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "RunError: Another process is working in" in second.stderr
    free = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert free.returncode == 0, free.stderr


def test_the_same_process_cannot_hold_it_twice_either(tmp_path: Path) -> None:
    with RunFolder(tmp_path).owned(), pytest.raises(RunError, match="Another process"), RunFolder(tmp_path).owned():
        pass
    with RunFolder(tmp_path).owned():
        pass


def test_an_error_inside_is_not_taken_for_one_of_the_folder_and_frees_it(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match="another file"), RunFolder(tmp_path).owned():
        raise PermissionError("another file")
    with RunFolder(tmp_path).owned():
        pass


def test_what_a_killed_run_left_of_its_scratch_goes_when_the_next_begins(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with run.owned(), run.scratch() as folder:
        assert folder.parent == tmp_path
        (folder / "states").write_bytes(b"x")
    assert not folder.exists()
    folder.mkdir()
    (folder / "states").write_bytes(b"x")
    with run.owned():
        assert not folder.exists()


def test_what_a_killed_command_left_half_written_goes_and_what_is_being_written_stays(tmp_path: Path) -> None:
    left: list[Path] = []

    def written(to: Path) -> None:
        to.write_bytes(b"x")
        left.append(to.rename(to.with_name(f"{to.name}2")))  # as if the command had been killed now
        os.utime(left[0], (1.0, 1.0))
        to.write_bytes(b"y")
        with RunFolder(tmp_path).owned():
            assert to.exists()
            assert not left[0].exists()

    write_atomic(tmp_path / "states/1.safetensors", written)
    assert [one.read_bytes() for one in (tmp_path / "states").iterdir()] == [b"y"]


def test_the_scratch_of_another_command_on_the_same_folder_stays(tmp_path: Path) -> None:
    with RunFolder(tmp_path).scratch() as folder:  # a comparison's, which trains its control there
        (folder / "states").write_bytes(b"x")
        with RunFolder(tmp_path).owned():
            assert (folder / "states").read_bytes() == b"x"
    assert not folder.exists()


def test_a_file_or_a_path_below_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunError, match="give a"), RunFolder(path).owned():
            pass


def test_the_home_folder_of_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match="~no-such-user/run lies in the home folder of nobody known here"):
        RunFolder("~no-such-user/run")
    monkeypatch.setenv("ELSTEER_CACHE", "~no-such-user/cache")
    with pytest.raises(RunError, match="give the path in full"):
        elsteer_cache()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="may not be written"), RunFolder(tmp_path / "run").owned():
        pass


def test_a_stage_goes_on_with_its_files_until_its_key_changes(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert not run.stage("collect", "a", ["rows.jsonl", "states"])
    (run / "rows.jsonl").write_text("{}\n")
    (run / "states").mkdir()
    (run / "states" / "0.safetensors").write_text("x")
    assert run.stage("collect", "a", ["rows.jsonl", "states"])
    assert (run / "rows.jsonl").exists()
    (run / "other.jsonl").write_text("{}\n")
    assert not run.stage("collect", "b", ["rows.jsonl", "states"])
    assert not (run / "rows.jsonl").exists()
    assert not (run / "states").exists()
    assert (run / "other.jsonl").exists()
    assert run.stages() == {"collect": "b"}


def test_killed_while_old_files_are_deleted_what_is_left_does_not_pass_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)
    run.stage("energy", "a", ["energy"])
    (run / "energy").mkdir()

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("elsteer.run.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run.stage("energy", "b", ["energy"])
    assert not run.stage("energy", "a", ["energy"])  # back to the first settings: done again
    assert not (run / "energy").exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", "3", "[" * 100_000])
def test_damaged_keys_are_told(damage: str, tmp_path: Path) -> None:
    (tmp_path / "stages.json").write_text(damage)
    with pytest.raises(RunError, match=r"stages\.json is damaged: delete it"):
        RunFolder(tmp_path).stages()


def test_prompts_of_a_split_are_read_as_they_were_given(tmp_path: Path) -> None:
    run, prompts = RunFolder(tmp_path), [Prompt.of("Kill it?", False, source="mine"), Prompt.of("Steal it.", True)]
    assert run.prompts("train") == []
    write_jsonl(run / "prompts.jsonl", [{**one.to_row(), "split": "dev"} for one in prompts])
    assert run.prompts("dev") == prompts
    assert run.prompts("neutral") == []


def test_keys_tell_values_apart_but_not_the_order_of_names() -> None:
    assert key_of({"a": 1, "b": [1, 2]}) == key_of({"b": (1, 2), "a": 1})
    assert len({key_of({"a": 1}), key_of({"a": 2}), key_of({"a": None}), key_of({"a": 1}, 0)}) == 4


def test_numbers_that_json_has_no_word_for_become_null() -> None:
    found = without_nan({"a": math.nan, "b": [1.0, math.inf, (2, "x")], "c": None, "d": True})
    assert found == {"a": None, "b": [1.0, None, [2, "x"]], "c": None, "d": True}
    json.dumps(found, allow_nan=False)


def test_ids_of_the_users_own_stand_for_the_text_too() -> None:
    """The id 7 of two files, or of one whose row was rewritten, must not bring back another prompt's answer."""
    one, other = Prompt.of("Kill it?", False, id="7"), Prompt.of("Kill them?", False, id="7")
    plain = Prompt.of("Hello", False)
    found = told_apart([one, other, plain])
    assert len({prompt.id for prompt in found}) == 3
    assert found[0].id.startswith("7-")
    assert found[2] == plain
    assert [prompt.text for prompt in found] == ["Kill it?", "Kill them?", "Hello"]
    assert told_apart(found) == found
