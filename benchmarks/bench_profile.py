"""Where the time of the offline stages goes, and how far it is from what the processor can do.

    .venv/bin/python benchmarks/bench_profile.py

One batch of 64 starter prompts on the real model: prefill and six tokens of decoding under torch's profiler, self time by
operation, beside the rate of a large matrix product. And int8: the model's layer shapes through torch's dynamic quantisation
(weights packed, activations quantised per call) against float32, in turn; above 1 the int8 layer is faster.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable

import torch
from side_by_side import in_turn, keep, ratio, seconds, show
from torch import nn
from torch.profiler import ProfilerActivity, profile

import elsteer
from elsteer.completions import PromptCaches, end_ids
from elsteer.decoding import decode
from elsteer.demo import MODEL
from elsteer.evaluation.figures import Figure, machine
from elsteer.models.linear import speed_up_linears
from elsteer.prompts import load_starter, sample

COMMAND = "python benchmarks/bench_profile.py"
ROWS, NEW = 64, 6
SHAPES = {"gate": (896, 4864), "down": (4864, 896)}


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
    table = []
    warnings.filterwarnings("ignore")
    for name, (into, out) in SHAPES.items():
        plain = nn.Sequential(nn.Linear(into, out, bias=False))
        packed = torch.ao.quantization.quantize_dynamic(copy.deepcopy(plain), {nn.Linear}, dtype=torch.qint8)
        speed_up_linears(plain)
        for rows in (1, 8, 64, 2048):
            x = torch.randn(rows, into)
            with torch.inference_mode():
                times = in_turn({"float32": lambda: plain(x), "int8": lambda: packed(x)}, 5)  # noqa: B023
            found_ratio = ratio(times["float32"], times["int8"])
            table.append([name, rows, f"{found_ratio.value:.2f}", f"{found_ratio.low:.2f} to {found_ratio.high:.2f}"])
            figures.append(Figure.of(f"int8.{name}.rows{rows}", found_ratio, COMMAND, 0, "random weights", machine()))
    show(["layer", "rows", "int8 times faster", "spread"], table)
    keep("profile", figures)


if __name__ == "__main__":
    main()
