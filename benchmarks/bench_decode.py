"""Decoding, plain against steered, on the real model: what steering adds to 64 generated tokens.

    .venv/bin/python benchmarks/bench_decode.py [--landscape FOLDER] [--compiled]

64 tokens in batches of 1, 8 and 32 rows, greedily, in lockstep: each token's pass runs plain and steered, one right after the
other and the order turned each time, so that what else the machine does meets both. The ratio: the median over tokens and
repeats of the pairs' ratios, the prompt's pass with the share of the time that it has; low and high: 95%, by bootstrap. What
`attach` takes, once, is told apart. Without --landscape, energies of random weights with the default rule's shape
stand in: a step costs the same whatever the numbers are. Further rows, of 16 tokens: other numbers of layers, a static cache,
and every token steered. --compiled measures `torch.compile` with a static cache, and that alone (compiling takes minutes).
"""

from __future__ import annotations

import argparse
import math
import time
from statistics import median

import torch
from side_by_side import keep, products, show
from transformers import PreTrainedModel

import elsteer
from elsteer.demo import MODEL, fast_dtype
from elsteer.evaluation.figures import Figure, machine
from elsteer.evaluation.overhead import decode_times, time_ratio
from elsteer.landscape import Landscape, SteeringRule
from elsteer.models import fingerprint, hidden_size, left_pad, num_layers
from elsteer.models.chat import encode_chat
from elsteer.prompts import load_starter

COMMAND = "python benchmarks/bench_decode.py"
NEW_TOKENS, FEW_TOKENS = 64, 16


def stand_in(model: PreTrainedModel, print_of: elsteer.models.Fingerprint, layers: int) -> Landscape:
    """A landscape of random product energies over the last `layers` blocks but two, of a step too small to matter."""
    size = hidden_size(model)
    made = products(size, num_layers(model), layers)
    tensors, guards = ({layer: found[at] for layer, found in made.items()} for at in (0, 1))
    rule = SteeringRule(layers=tuple(made), eta=1e-4 / math.sqrt(size), steps=1, window=0)
    return Landscape(rule, tensors, guards, print_of)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--landscape", default=None)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model, tokenizer = elsteer.load(MODEL, dtype=fast_dtype())
    print_of = fingerprint(model, tokenizer)
    given = elsteer.Landscape.from_pretrained(options.landscape) if options.landscape else stand_in(model, print_of, 10)
    prompts = [encode_chat(tokenizer, list(one.messages)) for one in load_starter("test")[:32]]
    table, figures = [], []
    attached: list[float] = []

    def measure(name: str, landscape: Landscape, rows: int, tokens: int, static: bool = False) -> None:
        ids, mask = left_pad(prompts[:rows], tokenizer.pad_token_id)
        ids, mask, repeats = ids.to(model.device), mask.to(model.device), options.repeats
        start = time.perf_counter()
        with landscape.attach(model, tokenizer=tokenizer) as steering:
            attached.append(time.perf_counter() - start)
            plain, steered = decode_times(model, steering, ids, mask, tokens=tokens, repeats=repeats, static=static)
        found = time_ratio(plain, steered)
        speeds = [rows * tokens / float(side.median(dim=0).values.sum()) for side in (plain, steered)]
        table.append(
            [name, len(landscape.rule.layers), rows, *(f"{speed:.1f}" for speed in speeds), f"{found.value:.4f}",
             f"{found.low:.4f} to {found.high:.4f}"]
        )  # fmt: skip
        note = f"steered / plain time, {len(landscape.rule.layers)} layers; plain {speeds[0]:.1f} tokens/s"
        figures.append(Figure.of(name, found, COMMAND, 0, MODEL, machine(), note=note))
        show(["figure", "layers", "rows", "plain tok/s", "steered tok/s", "ratio", "interval"], table[-1:])

    if options.compiled:
        model.forward = torch.compile(model.forward)  # type: ignore[method-assign]
        measure("decode.ratio.b1.compiled", given, 1, FEW_TOKENS, static=True)
        keep("decode", figures)
        return
    for rows in (1, 8, 32):
        measure(f"decode.ratio.b{rows}", given, rows, NEW_TOKENS)
    for layers in (3, 20):
        measure(f"decode.ratio.b1.layers{layers}", stand_in(model, print_of, layers), 1, FEW_TOKENS)
    measure("decode.ratio.b1.static", given, 1, FEW_TOKENS, static=True)
    measure("decode.ratio.b1.every", given.with_rule(window=NEW_TOKENS), 1, FEW_TOKENS)
    note = "attaching a landscape: its fingerprint compared with the model's, the hooks put up"
    figures.append(Figure("decode.attach_seconds", median(attached), COMMAND, 0, MODEL, machine(), note=note))
    keep("decode", figures)


if __name__ == "__main__":
    main()
