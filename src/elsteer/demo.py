"""`elsteer demo`: the main job from nothing to figures, on a real model, with the shipped starter prompts.

Fit on the train split, tune on dev, report on test. Everything lies in the run folder, and a second run reads it there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elsteer.completions import PromptCaches
from elsteer.errors import NothingHelps, PromptError, RunError
from elsteer.evaluation.evaluate import Evaluation, evaluate
from elsteer.evaluation.overhead import decode_times, time_ratio
from elsteer.evaluation.statistics import Interval
from elsteer.files import expanded, read_json, write_json
from elsteer.fitting import fit
from elsteer.landscape import Landscape
from elsteer.models import effective_thinking, left_pad, load
from elsteer.prompts import Prompt, load_starter
from elsteer.run import key_of, of_stage
from elsteer.settings import CollectSettings, FitSettings, TrainingSettings, TuningSettings

__all__ = ["DemoResult", "decode_overhead", "demo", "fast_dtype"]

Progress = Callable[[str, int, int], None]
MODEL = "Qwen/Qwen2.5-Coder-0.5B-Instruct"

# A fit that two cores finish in minutes: `elsteer fit` takes more prompts, answers more of them in full and tries more settings.
SETTINGS = FitSettings(
    limit=1000,
    dev_limit=150,
    attacks=(),  # what to do under attack takes more prompts, too
    collect=CollectSettings(full_answers=64, max_new_tokens=24),
    training=TrainingSettings(benign_weights=(2.0, 1.3, 3.0, 5.0)),
    tuning=TuningSettings(
        etas=(0.1,),  # a thousand prompts teach a shorter way than tens of thousands do
        kl=0.04,
        perplexity_ratio=1.08,
        tokens=16,
        bands=3,
        finalists=2,
        safety_weighted=-0.05,  # some 65 harmful prompts of one source: their error alone is half of that, and counts against it
        quality_prompts=64,
        quality_tokens=24,
        neutral_prompts=8,
    ),
)
TEST_PROMPTS = 120  # held-out starter prompts that are answered
PAST = "past/"
HARDER = ("twins/", "everyday/", PAST)  # families that a thousand prompts do not teach
LONGEST = 90  # characters of a training prompt: the time goes into reading them


@dataclass
class DemoResult:
    """What the demo found. timings: seconds by part, of this run; decode_overhead: steered over plain time of decoding."""

    evaluation: Evaluation
    landscape: Landscape
    decode_overhead: Interval | None
    run_dir: Path
    dtype: str
    timings: dict[str, float] = field(default_factory=dict)


def fast_dtype() -> torch.dtype:
    """bfloat16 where the machine multiplies it natively (an accelerator, or AVX-512 BF16 or AMX), else float32."""
    if torch.cuda.is_available():
        return torch.bfloat16
    native = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return torch.bfloat16 if any(ask is not None and ask() for ask in native) else torch.float32


def training_prompts() -> list[Prompt]:
    """The short starter prompts of the train split, without the families that take longer to learn (`HARDER`)."""
    return [one for one in load_starter("train") if len(one.text) <= LONGEST and not one.family.startswith(HARDER)]


def demo(
    *, run_dir: str | Path = "runs/demo", model: str = MODEL, dtype: str = "auto", progress: Progress | None = None
) -> DemoResult:
    """Load `model`, fit on the starter prompts, and measure plain against steered on the held-out ones.

    dtype "auto": `fast_dtype`. Raises what `load`, `fit` and `evaluate` raise; where nothing helps, the evaluation still
    shows the plain model (strength 0) before NothingHelps is raised again.
    """
    run_dir = expanded(run_dir)
    chosen = fast_dtype() if dtype == "auto" else dtype
    timings: dict[str, float] = {}
    start = time.perf_counter()
    llm, tokenizer = load(model, dtype=chosen)
    timings["loading the model"] = time.perf_counter() - start
    start = time.perf_counter()
    settings = SETTINGS
    if effective_thinking(tokenizer, False) is False:  # thoughts are no answers
        settings = settings.model_copy(update={"collect": settings.collect.model_copy(update={"thinking": False})})
    try:
        landscape = fit(
            llm,
            tokenizer,
            training_prompts(),
            dev=[one for one in load_starter("dev") if not one.family.startswith(PAST)],
            run_dir=run_dir,
            settings=settings,
            progress=progress,
            command="elsteer demo",
        )
    except NothingHelps as error:
        landscape = Landscape.from_pretrained(run_dir / "landscape")
        plain = _evaluate(llm, tokenizer, landscape, run_dir, progress)
        raise NothingHelps(f"{error} What the plain model does is in {plain.report}.") from error
    except (PromptError, RunError) as error:
        if "--" not in str(error):
            raise
        raise type(error)(f"{error} (These are settings of `elsteer fit`, the demo has none.)") from error
    timings["fitting"] = time.perf_counter() - start
    start = time.perf_counter()
    found = _evaluate(llm, tokenizer, landscape, run_dir, progress)
    timings["measuring"] = time.perf_counter() - start
    start = time.perf_counter()
    overhead = _overhead(llm, tokenizer, landscape, run_dir, progress)
    timings["timing the decoding"] = time.perf_counter() - start
    return DemoResult(found, landscape, overhead, run_dir, str(llm.dtype).removeprefix("torch."), timings)


def _evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    landscape: Landscape,
    run_dir: Path,
    progress: Progress | None,
) -> Evaluation:
    return evaluate(
        model,
        tokenizer,
        ["none", landscape],
        ["starter"],
        run_dir=run_dir,
        limit=TEST_PROMPTS,
        max_new_tokens=24,
        quality_prompts=24,
        quality_tokens=32,
        progress=progress,
        command="elsteer demo",
    )


def decode_overhead(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    landscape: Landscape,
    *,
    rows: int = 8,
    new_tokens: int = 64,
    repeats: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Interval:
    """Time of decoding steered over plain, batch of `rows`, in lockstep (`elsteer.evaluation.overhead`)."""
    prompts = [one for one in load_starter("test") if one.category == "plain"][:rows]
    caches = PromptCaches(model, tokenizer, prompts)
    ids, mask = (part.to(model.device) for part in left_pad(caches.ids, tokenizer.pad_token_id))
    with landscape.attach(model, tokenizer=tokenizer) as steering:
        times = decode_times(model, steering, ids, mask, tokens=new_tokens, repeats=repeats, progress=progress)
    return time_ratio(*times)


def _overhead(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    landscape: Landscape,
    run_dir: Path,
    progress: Progress | None,
) -> Interval:
    path = run_dir / "evaluation" / "overhead.json"
    key = key_of(landscape.rule.to_dict(), landscape.digest(), str(model.dtype), landscape.fingerprint.to_dict())
    told = read_json(path)
    if isinstance(told, dict) and told.get("key") == key and told.keys() >= {"value", "low", "high", "n"}:
        return Interval(told["value"], told["low"], told["high"], told["n"])
    found = decode_overhead(
        model,
        tokenizer,
        landscape,
        new_tokens=32,
        progress=of_stage(progress, "timing the decoding"),
    )
    write_json(path, {"key": key, "value": found.value, "low": found.low, "high": found.high, "n": found.n})
    return found
