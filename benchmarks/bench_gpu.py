"""Decoding on a GPU, plain against steered: random weights of Llama-3.1-8B's shape in bfloat16, 15 layers steered.

    .venv/bin/python benchmarks/bench_gpu.py

Milliseconds per decoding step through `generate`, 64 tokens, batches of 1 to 64: eager with a dynamic cache, compiled with a
static one, and compiled into CUDA graphs; and the kernels that one eager pass launches. In turn (plain, steered, plain, ...),
switched by `disable` and `enable`, so that neither side compiles again. `gpu.decode.ratio.bN` is the CUDA graphs' ratio with the
default window (the prompt's last token alone); `...every.bN` the same with every generated token steered, as in the paper.

Random weights take as long as real ones. Without a GPU it says so and exits 0. --tiny runs the same code on a small shape on
whatever there is, to see that it works: nothing is written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from statistics import median

import torch
from side_by_side import in_turn, keep, products, ratio, show
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, CompileConfig, LlamaConfig, PreTrainedModel

from elsteer.energy.descent import Descent
from elsteer.evaluation.figures import Figure
from elsteer.steering import Steering

COMMAND = "python benchmarks/bench_gpu.py"
LLAMA_8B = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500_000.0,
}  # fmt: skip
TINY = LLAMA_8B | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 18,
                   "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
NAME = "random weights of Llama-3.1-8B's shape, bfloat16"
LAYERS, NEW_TOKENS, PROMPT = 15, 64, 64
WINDOWS = {"": 0, "every.": NEW_TOKENS}
MODES = {"eager": None, "compiled": "default", "": "reduce-overhead"}  # "": CUDA graphs


def random_model(shape: dict[str, object], device: str) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16).eval()


def moves(model: PreTrainedModel) -> dict[int, Descent]:
    """Product energies of random weights over LAYERS blocks, of a step too small to matter."""
    made = products(model.config.hidden_size, model.config.num_hidden_layers, LAYERS)
    return {layer: Descent(tensors, eta=1e-6, steps=1, guard=guard) for layer, (tensors, guard) in made.items()}


def kernels(run: Callable[[], object]) -> int:
    """Kernels that a call launches on the GPU; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        run()
        torch.cuda.synchronize()
    return sum(one.count for one in found.key_averages() if one.key.startswith(("cudaLaunchKernel", "cuLaunchKernel")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small shape on whatever there is; writes nothing")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.tiny:
        sys.stdout.write("bench_gpu: no GPU here, so nothing is measured.\n")
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    model = random_model(TINY if options.tiny else LLAMA_8B, device)
    table, figures = [], []
    for window_name, window in WINDOWS.items():
        for mode_name, mode in MODES.items():
            for rows in options.rows:
                ids = torch.randint(0, model.config.vocab_size, (rows, PROMPT), device=device)
                with Steering(model, moves(model), window=window) as steering:
                    step, launched = measured(model, ids, mode, steering, options.repeats)
                found = ratio(step["steered"], step["plain"])
                each = {name: 1e3 * median(times) / NEW_TOKENS for name, times in step.items()}
                name = ".".join(part for part in ("gpu.decode", mode_name, f"ratio.{window_name}b{rows}") if part)
                note = f"ms per step: plain {each['plain']:.3f}, steered {each['steered']:.3f}; {LAYERS} layers, "
                note += f"window {window}"
                if launched:
                    note += f"; kernels of a step: plain {launched[0]}, steered {launched[1]}"
                figures.append(Figure.of(name, found, COMMAND, 0, NAME, where, note=note))
                table.append(
                    [name, f"{each['plain']:.3f}", f"{each['steered']:.3f}", f"{found.value:.4f}", *(launched or "--")]
                )
                show(["figure", "plain ms", "steered ms", "ratio", "kernels", "steered"], table[-1:])
    if options.tiny:
        sys.stdout.write("A small shape: nothing is written.\n")
        return
    keep("gpu", figures)


def measured(
    model: PreTrainedModel, ids: torch.Tensor, mode: str | None, steering: Steering, repeats: int
) -> tuple[dict[str, list[float]], list[int]]:
    """Seconds of 64 tokens plain and steered, and the kernels of one eager step, plain and steered (where it is eager)."""
    how: dict[str, object] = {}
    if mode is not None:
        compiling = CompileConfig(mode=mode, fullgraph=False)
        compiling._compile_all_devices = True
        how = {"cache_implementation": "static", "compile_config": compiling}

    def run(new: int = NEW_TOKENS) -> None:
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new, max_new_tokens=new,
                pad_token_id=0, **how,
            )  # fmt: skip

    def plain() -> None:
        steering.disable()
        run()

    def steered() -> None:
        steering.enable()
        run()

    launched = []
    if mode is None:
        for switch in (steering.disable, steering.enable):
            switch()
            launched.append(kernels(lambda: run(2)) - kernels(lambda: run(1)))
    for _ in range(2):  # compiled, then recorded
        plain()
        steered()
    return in_turn({"plain": plain, "steered": steered}, repeats, 0.0), launched


if __name__ == "__main__":
    main()
