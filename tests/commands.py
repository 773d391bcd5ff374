"""Running the command in tests: in this process, or in one of its own that can be stopped."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from click.testing import CliRunner, Result

from elsteer.cli import app
from elsteer.judges import JUDGES, Verdict
from tiny import tiny_model, tiny_tokenizer

__all__ = ["FAST", "CoinJudge", "elsteer", "one_sentence", "save_tiny", "started", "stop_when", "write_prompts"]

# A fit of a tiny model in a second or two.
FAST = shlex.split(
    """
    --judge coin --max-new-tokens 6 --batch-size 16 --training-width 8 --training-hidden 4 --training-epochs 3
    --training-refine-epochs 1
    --tuning-etas 2,6 --tuning-steps 1 --tuning-windows 0 --tuning-gates none --tuning-tokens 6 --tuning-finalists 2
    --tuning-least-removed -10 --tuning-safety-margin -1 --tuning-safety-weighted -1 --tuning-worst-source -1
    --tuning-perplexity-ratio 1000 --tuning-kl 1000
    --tuning-quality-prompts 4 --tuning-quality-tokens 4 --tuning-neutral-prompts 2
    """
)


class CoinJudge:
    """Takes the noise of a random model for answers, so that all four outcomes occur: an odd checksum refuses."""

    name = "coin"

    def judge(self, prompt: str, completion: str) -> Verdict:
        odd = zlib.crc32((prompt + completion).encode("utf-8", "replace")) % 2 == 1
        return Verdict("refusal" if odd else "compliance", float(odd), "its checksum")

    def decided(self, prompt: str, partial: str) -> Verdict | None:
        return None


def elsteer(*args: str | Path, input: str | bytes | None = None) -> Result:
    """The command, run in this process with `CoinJudge` as a further judge."""
    JUDGES["coin"] = CoinJudge
    try:
        return CliRunner().invoke(app, list(map(str, args)), input=input)
    finally:
        del JUDGES["coin"]


def started(*args: str | Path, slow: float = 0.0, cwd: Path | None = None) -> subprocess.Popen[str]:
    """The command in a process of its own, with `CoinJudge`; slow: seconds that each of its words takes."""
    script = (
        # A shell that puts the tests into the background lets its children ignore Ctrl-C: undo that.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import time, commands\n"
        "class Slow(commands.CoinJudge):\n"
        f"    def judge(self, *a): time.sleep({slow}); return super().judge(*a)\n"
        "from elsteer.judges import JUDGES\n"
        "JUDGES['coin'] = Slow\n"
        "from elsteer.cli import main\n"
        "main()\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path[1:]])
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, args)],
        stdin=subprocess.PIPE,  # open, and nothing comes from it
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def stop_when(process: subprocess.Popen[str], now: Callable[[str], bool], seconds: float = 300) -> str:
    """Press Ctrl-C once `now(stderr so far)`; all of stderr. Fails where the process ends before or takes too long."""
    assert process.stderr is not None
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stderr or ()))
    reader.start()
    end = time.monotonic() + seconds
    while not now("".join(said)):
        assert process.poll() is None, f"it ended with {process.returncode} before it was stopped:\n{''.join(said)}"
        if time.monotonic() > end:
            process.kill()
            raise AssertionError(f"it did not come so far in {seconds} s:\n{''.join(said)}")
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    reader.join()
    return "".join(said)


def one_sentence(result: Result, code: int = 2) -> str:
    """Assert that the command ended with `code` and one sentence of an error on stderr; the sentence."""
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, result.stderr
    assert result.stderr.splitlines()[-1] == errors[0], "nothing follows the error"
    assert "Traceback" not in result.output
    assert "defect of elsteer" not in errors[0]
    return errors[0]


def save_tiny(folder: Path, family: str = "qwen2", seed: int = 0, **config: int) -> Path:
    """A tiny model and its chat tokenizer as a folder."""
    tiny_model(family, seed, **{"max_position_embeddings": 512, **config}).save_pretrained(folder)
    tiny_tokenizer("chatml").save_pretrained(folder)
    return folder


def write_prompts(path: Path, count: int, words: Sequence[str]) -> Path:
    """`count` prompts of their own kind, a line each."""
    lines = [f"{words[at % len(words)]} {chr(97 + at % 26) * (2 + at % 5)}{at} please" for at in range(count)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
