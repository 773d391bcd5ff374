"""Decoding on a GPU, plain against steered: random weights of Llama-3.1-8B's shape in bfloat16, 15 layers steered.

    .venv/bin/python benchmarks/bench_gpu.py [--seconds 600]

Milliseconds per decoding step of 64 tokens, batches of 1 to 64, in turn (plain, steered, plain, ...):
- `graph`: the step captured into a CUDA graph as it is and replayed, as serving engines do it. `gpu.decode.ratio.bN` is this one
  with the default window (the prompt's last token alone), `gpu.decode.every.bN` with every generated token steered, as in the
  paper;
- `eager`: `generate` with a dynamic cache;
- `compiled`, `compiled_graphs`: `generate` with a static cache, compiled by inductor without and with CUDA graphs.
Beside each stand the kernels of a step. In compiled code steering is switched by `disable` and `enable`, so neither side
compiles again. Every figure is on disk as soon as it is measured; --seconds ends the run before the next one once they are over.

Random weights take as long as real ones. Without a GPU it says so and exits 0. --tiny runs the same code on a small shape on
whatever there is, to see that it works: nothing is written.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from side_by_side import in_turn, keep, products, ratio, show
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, CompileConfig, LlamaConfig, PreTrainedModel, StaticCache

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
EVERY = NEW_TOKENS
GPU = torch.cuda.is_available()
# name of the figure without the batch, way of running, window
WAYS = (
    ("gpu.decode.ratio", "graph", 0),
    ("gpu.decode.every", "graph", EVERY),
    ("gpu.decode.eager", "eager", 0),
    ("gpu.decode.eager.every", "eager", EVERY),
    ("gpu.decode.compiled_graphs", "reduce-overhead", 0),
    ("gpu.decode.compiled_graphs.every", "reduce-overhead", EVERY),
    ("gpu.decode.compiled", "default", 0),
)


def random_model(shape: dict[str, object], device: str) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16).eval()


def moves(model: PreTrainedModel) -> dict[int, Descent]:
    """Product energies of random weights over LAYERS blocks, of a step too small to matter."""
    made = products(model.config.hidden_size, model.config.num_hidden_layers, LAYERS)
    return {layer: Descent(tensors, eta=1e-6, steps=1, guard=guard) for layer, (tensors, guard) in made.items()}


def kernels(run: Callable[[], object]) -> int:
    """Kernels that a call runs on the GPU; 0 without one."""
    if not GPU:
        return 0
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        run()
        torch.cuda.synchronize()
    of_gpu = torch.autograd.DeviceType.CUDA
    return sum(one.count for one in found.key_averages() if one.device_type == of_gpu and "Mem" not in one.key)


class Captured:
    """The decoding step, plain or steered, captured into a CUDA graph: 64 replays go on from the prompt."""

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, ids: Tensor, steering: Steering, steered: bool) -> None:
        self.cache = StaticCache(config=model.config, max_cache_len=PROMPT + NEW_TOKENS + 8)
        self.token = torch.zeros(len(ids), 1, dtype=torch.long, device=ids.device)
        self.position = torch.zeros(len(ids), 1, dtype=torch.long, device=ids.device)
        model(input_ids=ids, past_key_values=self.cache)  # makes the cache
        self.counts = [layer.cumulative_length for layer in self.cache.layers]

        def step() -> None:
            said = model(input_ids=self.token, position_ids=self.position, past_key_values=self.cache, logits_to_keep=1)
            self.token.copy_(said.logits[:, -1].argmax(dim=-1, keepdim=True))
            self.position.add_(1)

        self.replay: Callable[[], object] = step
        steering.enable() if steered else steering.disable()
        self.prefill(model, ids)
        if GPU:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            self.prefill(model, ids)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                step()
            self.replay = self.graph.replay
        steering.disable()

    def prefill(self, model: PreTrainedModel, ids: Tensor) -> None:
        self.rewind(0)
        said = model(input_ids=ids, past_key_values=self.cache, logits_to_keep=1)
        self.token.copy_(said.logits[:, -1].argmax(dim=-1, keepdim=True))
        self.rewind(PROMPT)

    def rewind(self, count: int) -> None:
        for counted in self.counts:
            counted.fill_(count)
        self.position.fill_(count)

    @torch.inference_mode()
    def __call__(self) -> None:
        self.rewind(PROMPT)
        for _ in range(NEW_TOKENS):
            self.replay()


def captured(
    model: PreTrainedModel, ids: Tensor, steering: Steering, repeats: int
) -> tuple[dict[str, list[float]], list[int]]:
    runs: dict[str, Callable[[], object]] = {
        name: Captured(model, ids, steering, name == "steered") for name in ("plain", "steered")
    }
    launched = [kernels(run.replay) for run in runs.values() if isinstance(run, Captured)]
    for run in runs.values():  # the clock of an idle GPU rises slowly
        run()
    return in_turn(runs, repeats, 0.0), launched


def generated(
    model: PreTrainedModel, ids: Tensor, steering: Steering, repeats: int, mode: str
) -> tuple[dict[str, list[float]], list[int]]:
    how: dict[str, object] = {"disable_compile": True}
    if mode != "eager":
        torch.compiler.reset()
        compiling = CompileConfig(mode=mode, fullgraph=False, dynamic=False)
        compiling._compile_all_devices = True
        how = {"cache_implementation": "static", "compile_config": compiling}
        model.__dict__.pop("_compiled_call", None)  # transformers keeps the first mode for ever

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
    if mode == "eager":
        for switch in (steering.disable, steering.enable):
            switch()
            launched.append(kernels(lambda: run(3)) - kernels(lambda: run(2)))
    else:  # compiled, then recorded
        for _ in range(2):
            plain()
            steered()
    return in_turn({"plain": plain, "steered": steered}, repeats, 0.0), launched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small shape on whatever there is; writes nothing")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--ways", nargs="+", choices=sorted({way for _, way, _ in WAYS}), help="which of them")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing more after so many")
    options = parser.parse_args()
    if not GPU and not options.tiny:
        sys.stdout.write("bench_gpu: no GPU here, so nothing is measured.\n")
        return
    began = time.perf_counter()
    device = "cuda" if GPU else "cpu"
    where = torch.cuda.get_device_name() if GPU else "CPU"
    model = random_model(TINY if options.tiny else LLAMA_8B, device)
    figures: list[Figure] = []
    for name, way, window in WAYS:
        if options.ways and way not in options.ways:
            continue
        for rows in options.rows:
            if time.perf_counter() - began > options.seconds:
                sys.stdout.write(f"--seconds is over: {name}.b{rows} and what follows is left out.\n")
                return
            ids = torch.randint(0, model.config.vocab_size, (rows, PROMPT), device=device)
            with Steering(model, moves(model), window=window) as steering:
                if way == "graph":
                    times, launched = captured(model, ids, steering, options.repeats)
                else:
                    times, launched = generated(model, ids, steering, options.repeats, way)
            found = ratio(times["steered"], times["plain"])
            each = {side: 1e3 * median(spent) / NEW_TOKENS for side, spent in times.items()}
            note = f"ms per step: plain {each['plain']:.3f}, steered {each['steered']:.3f}; {LAYERS} layers, "
            note += "every token steered" if window else "the prompt's last token steered"
            if launched:
                note += f"; kernels of a step: plain {launched[0]}, steered {launched[1]}"
            label = f"{name}.b{rows}"
            figures.append(Figure.of(label, found, COMMAND, 0, NAME, where, note=note))
            row: list[object] = [label, f"{each['plain']:.3f}", f"{each['steered']:.3f}", f"{found.value:.4f}"]
            row += [f"{found.low:.4f} to {found.high:.4f}", *(launched or ["", ""])]
            show(["figure", "plain ms", "steered ms", "ratio", "spread", "kernels", ""], [row])
            if not options.tiny:
                keep("gpu", figures)
    if options.tiny:
        sys.stdout.write("A small shape: nothing is written.\n")


if __name__ == "__main__":
    main()
