"""Where the time of the offline stages goes, and how far it is from what the processor can do.

    .venv/bin/python benchmarks/bench_profile.py

One batch of 64 starter prompts on the real model: prefill and six tokens of decoding under torch's profiler, self time by
operation, beside the rate of a large matrix product. And other weights: the layers of that model in bfloat16, and in int8 by
torch's dynamic quantisation (weights packed, activations quantised per call; the output layer as it was), each answering the
same prompts: how often the verdict is float32's, and how many times faster the answers are there. And weights alone packed into
8 and 4 bits, activations in bfloat16: single layers against bfloat16's product, in turn; above 1 the packed one is faster.
"""

from __future__ import annotations

import copy
import itertools
import time
import warnings
from collections.abc import Callable

import torch
from side_by_side import in_turn, keep, no_options, ratio, seconds, show
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import elsteer
from elsteer.completions import PromptCaches, complete, end_ids
from elsteer.decoding import decode
from elsteer.demo import MODEL
from elsteer.evaluation.figures import Figure, machine
from elsteer.evaluation.statistics import wilson
from elsteer.judges import RulesJudge
from elsteer.models.linear import CpuLinear
from elsteer.prompts import load_starter, sample

COMMAND = "python benchmarks/bench_profile.py"
ROWS, NEW = 64, 6
PROMPTS, TOKENS = 96, 16
SHAPES = {"gate": (896, 4864), "down": (4864, 896)}
COPIES, GROUP = 16, 32


def shares(run: Callable[[], object]) -> tuple[float, dict[str, float]]:
    """Seconds of `run`, and the share of each operation in its own time, greatest first."""
    start = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run()
    spent = time.perf_counter() - start
    times = {one.key: one.self_cpu_time_total for one in found.key_averages()}
    total = sum(times.values())
    return spent, {key: value / total for key, value in sorted(times.items(), key=lambda pair: -pair[1])}


def main() -> None:
    square = torch.randn(1024, 1024)
    peak = 2 * 1024**3 / seconds(lambda: square @ square, 1.0)
    model, tokenizer = elsteer.load(MODEL, dtype=torch.float32, device="cpu")
    caches = PromptCaches(model, tokenizer, sample(load_starter("train"), ROWS, 0))
    next(iter(caches.batches()))  # the shared prefix, and warm
    caches.forget()
    batches = []
    spent, prefill = shares(lambda: batches.extend(caches.batches()))
    ends = end_ids(model, tokenizer)
    decoded, step = shares(lambda: decode(model, batches[0], max_new_tokens=NEW, end_ids=ends))
    weights = sum(
        m.weight.numel() for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"
    )
    columns = batches[0].mask.shape[1] - len(caches._shared.ids) - 1  # type: ignore[union-attr]
    rate = 2 * weights * ROWS * columns / spent
    figures = [
        Figure("profile.peak_gflops", peak / 1e9, COMMAND, 0, "1024^3, float32", machine()),
        Figure(
            "profile.prefill.of_peak", rate / peak, COMMAND, 0, MODEL, machine(), note=f"{ROWS} prompts, {spent:.1f} s"
        ),
    ]
    for name, found in (("prefill", prefill), (f"decoding {NEW} tokens", step)):
        show([name, "share"], [[key, f"{value:.1%}"] for key, value in list(found.items())[:8]])
        matmul = sum(value for key, value in found.items() if key in ("aten::mm", "aten::addmm", "aten::bmm"))
        top = ", ".join(f"{key.removeprefix('aten::')} {value:.1%}" for key, value in list(found.items())[:6])
        figures.append(Figure(f"profile.{name.split()[0]}.matmul", matmul, COMMAND, 0, MODEL, machine(), note=top))
    figures.append(
        Figure("profile.decode.seconds_per_step", decoded / NEW, COMMAND, 0, MODEL, machine(), note=f"{ROWS} rows")
    )
    figures += packed_weights()
    figures += other_weights(model, tokenizer)
    keep("profile", figures)


def other_weights(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Figure]:
    """Verdicts and times of the model in bfloat16 and in int8 against float32."""
    warnings.filterwarnings("ignore")  # torch.ao moves to torchao, whose kernels for the CPU are the same
    prompts = sample(load_starter("train"), PROMPTS, 0)

    def answered(one: PreTrainedModel) -> tuple[list[str], float]:
        caches = PromptCaches(one, tokenizer, prompts)
        start = time.perf_counter()
        found = complete(caches, RulesJudge(), max_new_tokens=TOKENS, early_stop=False)
        return [each.label for each in found], time.perf_counter() - start

    wanted, plain = answered(model)
    packed = copy.deepcopy(model)
    for module in packed.modules():
        if isinstance(module, CpuLinear):
            module.__class__ = nn.Linear  # what the quantisation knows
    torch.ao.quantization.quantize_dynamic(packed.model, {nn.Linear}, dtype=torch.qint8, inplace=True)
    figures, table = [], []
    for name, one in (("int8", packed), ("bfloat16", model.to(torch.bfloat16))):
        labels, spent = answered(one)
        same = wilson(sum(a == b for a, b in zip(labels, wanted, strict=True)), len(labels))
        table.append([name, f"{same.value:.3f}", f"{same.low:.3f} to {same.high:.3f}", f"{plain / spent:.2f}"])
        note = f"{PROMPTS} prompts, {TOKENS} tokens; float32 took {plain:.0f} s"
        figures.append(Figure.of(f"profile.{name}.same_verdict", same, COMMAND, 0, MODEL, machine(), note=note))
        figures.append(Figure(f"profile.{name}.times_faster", plain / spent, COMMAND, 0, MODEL, machine(), note=note))
    show(["weights", "same verdict", "interval", "times faster than float32"], table)
    return figures


def packed_weights() -> list[Figure]:
    """Layers of packed weights against bfloat16's; each turn takes another of several layers, so that no cache holds them."""
    figures, table = [], []
    for name, (into, out) in SHAPES.items():
        plain = [torch.randn(out, into, dtype=torch.bfloat16) for _ in range(COPIES)]
        scales = torch.ones(out, dtype=torch.bfloat16)
        groups = torch.ones(into // GROUP, out, 2, dtype=torch.bfloat16)
        eight = [torch.randint(-128, 127, (out, into), dtype=torch.int8) for _ in range(COPIES)]
        four = [
            torch._convert_weight_to_int4pack_for_cpu(torch.randint(0, 15, (out, into), dtype=torch.int32), 1)
            for _ in range(COPIES)
        ]
        for rows in (1, 8, 64, 2048):
            x, turn = torch.randn(rows, into, dtype=torch.bfloat16), itertools.cycle(range(COPIES))
            runs: dict[str, Callable[[], object]] = {
                "bfloat16": lambda: nn.functional.linear(x, plain[next(turn)]),  # noqa: B023
                "int8": lambda: torch._weight_int8pack_mm(x, eight[next(turn)], scales),  # noqa: B023
                "int4": lambda: torch._weight_int4pack_mm_for_cpu(x, four[next(turn)], GROUP, groups),  # noqa: B023
            }
            with torch.inference_mode():
                times = in_turn(runs, 5)
            for bits in ("int8", "int4"):
                found = ratio(times["bfloat16"], times[bits])
                table.append([name, rows, bits, f"{found.value:.2f}", f"{found.low:.2f} to {found.high:.2f}"])
                label = f"packed.{bits}.{name}.rows{rows}"
                figures.append(Figure.of(label, found, COMMAND, 0, "random weights", machine()))
    show(["layer", "rows", "weights", "times faster than bfloat16", "spread"], table)
    return figures


if __name__ == "__main__":
    no_options(__doc__)
    main()
