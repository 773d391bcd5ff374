"""Decoding, plain against steered, on the real model: what steering adds to 64 generated tokens.

    .venv/bin/python benchmarks/bench_decode.py [--landscape FOLDER] [--compiled]

Batches of 1, 8 and 32 rows through `generate`, in turn (plain, steered, plain, ...). Without --landscape, energies of random
weights with the default rule's shape stand in: a step costs the same whatever the numbers are. Further rows: more layers, and
a static cache. --compiled adds `torch.compile` (minutes on a CPU).
"""

from __future__ import annotations

import argparse
import math

import torch
from side_by_side import in_turn, keep, products, ratio, show
from transformers import PreTrainedModel

import elsteer
from elsteer.demo import MODEL, fast_dtype
from elsteer.evaluation.figures import Figure, machine
from elsteer.landscape import Landscape, SteeringRule
from elsteer.models import fingerprint, hidden_size, left_pad, num_layers
from elsteer.models.chat import encode_chat
from elsteer.prompts import load_starter

COMMAND = "python benchmarks/bench_decode.py"
NEW_TOKENS = 64


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
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    model, tokenizer = elsteer.load(MODEL, dtype=fast_dtype())
    print_of = fingerprint(model, tokenizer)
    given = elsteer.Landscape.from_pretrained(options.landscape) if options.landscape else stand_in(model, print_of, 10)
    prompts = [encode_chat(tokenizer, list(one.messages)) for one in load_starter("test")[:32]]
    table, figures = [], []

    def measure(name: str, landscape: Landscape, rows: int, repeats: int, **how: object) -> None:
        ids, mask = left_pad(prompts[:rows], tokenizer.pad_token_id)
        ids, mask = ids.to(model.device), mask.to(model.device)

        def plain() -> None:
            with torch.inference_mode():
                model.generate(
                    ids,
                    attention_mask=mask,
                    do_sample=False,
                    min_new_tokens=NEW_TOKENS,
                    max_new_tokens=NEW_TOKENS,
                    pad_token_id=tokenizer.pad_token_id,
                    **how,
                )

        def steered() -> None:
            with landscape.attach(model, tokenizer=tokenizer):
                plain()

        times = in_turn({"plain": plain, "steered": steered}, repeats, 0.0)
        found = ratio(times["steered"], times["plain"])
        speeds = [rows * NEW_TOKENS / sorted(times[one])[repeats // 2] for one in ("plain", "steered")]
        table.append(
            [name, len(landscape.rule.layers), rows, *(f"{speed:.1f}" for speed in speeds), f"{found.value:.4f}",
             f"{found.low:.4f} to {found.high:.4f}"]
        )  # fmt: skip
        note = f"steered / plain time, {len(landscape.rule.layers)} layers; plain {speeds[0]:.1f} tokens/s"
        figures.append(Figure.of(name, found, COMMAND, 0, MODEL, machine(), note=note))
        show(["figure", "layers", "rows", "plain tok/s", "steered tok/s", "ratio", "spread"], table[-1:])

    for rows, repeats in ((1, 2 * options.repeats), (8, options.repeats), (32, max(3, options.repeats // 2))):
        measure(f"decode.ratio.b{rows}", given, rows, repeats)
    for layers in (3, 12, 20):
        measure(f"decode.ratio.b8.layers{layers}", stand_in(model, print_of, layers), 8, options.repeats)
    measure("decode.ratio.b8.static", given, 8, options.repeats, cache_implementation="static")
    if options.compiled:
        model.forward = torch.compile(model.forward)  # type: ignore[method-assign]
        measure("decode.ratio.b8.compiled", given, 8, options.repeats, cache_implementation="static")
    keep("decode", figures)


if __name__ == "__main__":
    main()
