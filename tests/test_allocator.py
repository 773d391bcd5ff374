"""Freed memory stays with the process; each case in a process of its own, since what is set is the whole process's."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest

from elsteer.allocator import keep_freed_memory

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")

# Pages touched by 20 blocks of 64 MiB, one after the other, each freed before the next.
PROGRAM = """
import json, resource, sys
from elsteer.allocator import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
def touch():
    block = bytearray(64 << 20)
    for at in range(0, len(block), 4096):
        block[at] = 1
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    touch()
print(json.dumps([kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before]))
"""


def faults(*arguments: str, **variables: str) -> tuple[bool | None, int]:
    """What `keep_freed_memory` returned, and page faults of PROGRAM."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], env=clean | variables, capture_output=True, text=True, check=True
    )
    kept, count = json.loads(done.stdout)
    return kept, count


@glibc
def test_blocks_are_used_again_and_not_paged_in_anew() -> None:
    kept, count = faults("keep")
    plain = faults("leave")[1]
    assert kept is True
    assert count * 10 < plain


@glibc
@pytest.mark.parametrize(
    ("variable", "value"),
    [("MALLOC_TRIM_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072")],
)
def test_what_the_user_has_set_stands(variable: str, value: str) -> None:
    assert faults("keep", **{variable: value})[0] is False


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
