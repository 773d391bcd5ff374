"""The Makefile's own logic, with a stand-in for the environment's Python that notes what it is asked to do."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = """#!/bin/sh
case "$*" in *install*) echo begin "$*" >> log; sleep 0.05; echo end >> log;; esac
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with spaces in its name, as users have them."""
    folder = tmp_path / "a clone"
    (folder / ".venv/bin").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for name in ("python", "pip"):
        (folder / ".venv/bin" / name).write_text(PYTHON)
        (folder / ".venv/bin" / name).chmod(0o755)
    return folder


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    own = {**os.environ, "MAKEFLAGS": ""}  # not those of the make that runs the tests
    return subprocess.run(["make", *words], cwd=folder, env=own, capture_output=True, text=True, check=False)


def installs(folder: Path) -> list[str]:
    """What was installed since the last look: one after the other, or there is no such list."""
    log = folder / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    assert lines[1::2] == ["end"] * (len(lines) // 2)
    return [line.split("--quiet install ")[1] for line in lines[::2]]


def test_it_installs_once_and_again_where_the_project_asks_for_other_things(clone: Path) -> None:
    assert make(clone, "demo").returncode == 0
    assert installs(clone) == ["--editable ."]
    assert make(clone, "lint").returncode == 0
    assert installs(clone) == ["--editable .[dev]"]
    assert make(clone, "demo", "lint").returncode == 0
    assert installs(clone) == []
    later = (clone / ".venv/.installed-dev").stat().st_mtime + 5
    subprocess.run(["touch", "-d", f"@{later}", "pyproject.toml"], cwd=clone, check=True)
    assert make(clone, "lint").returncode == 0
    assert installs(clone) == ["--editable .[dev]"]


def test_a_clone_that_was_moved_or_copied_does_not_run_the_code_of_the_first(clone: Path) -> None:
    make(clone, "lint")
    installs(clone)
    other = clone.with_name("copy")
    shutil.copytree(clone, other)
    assert make(other, "demo").returncode == 0
    assert installs(other) == ["--editable ."]
    assert make(other, "lint").returncode == 0
    assert installs(other) == ["--editable .[dev]"]
    assert make(clone, "lint").returncode == 0
    assert installs(clone) == []


def test_two_goals_at_a_time_do_not_install_at_a_time(clone: Path) -> None:
    assert make(clone, "-j4", "demo", "lint").returncode == 0
    assert installs(clone) == ["--editable .", "--editable .[dev]"]


def test_an_environment_whose_python_is_gone_is_told(clone: Path) -> None:
    (clone / ".venv/bin/python").unlink()
    (clone / ".venv/bin/python").symlink_to("/nowhere/python3")
    found = make(clone, "demo")
    assert found.returncode == 2
    assert "The Python that .venv was made with is gone: run make clean, and then this again" in found.stderr
    assert make(clone).returncode == 0
    assert make(clone, "clean").returncode == 0
    assert not (clone / ".venv").exists()
