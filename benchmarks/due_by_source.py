"""What u alone would do: were dev prompts refused just where the landscape's u says that refusing is due.

    .venv/bin/python benchmarks/due_by_source.py RUN [--weights 6.3 16 25] [--points 8 5 3]

RUN is the run folder of a fit. Its dev prompts are read once more, unsteered, and u, the mean over the steered blocks, is
taken at the prompt's last token. Two tables: by source, the share of prompts above the line of each weight of the benign
half; and at so many points of harmful refusals more than the plain model has, the false refusals removed, net of benign
prompts that would then be refused. Against the whole verdicts in RUN/frontier.jsonl that tells what reading harm costs, and
what the step does.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import elsteer
from elsteer.completions import PromptCaches, read_completions
from elsteer.decoding import first_logits
from elsteer.demo import fast_dtype
from elsteer.files import read_jsonl
from elsteer.landscape import Landscape
from elsteer.prompts import Prompt, under_attack
from elsteer.settings import FitSettings
from elsteer.steering.attach import Steering


def due_of(landscape: Landscape, run: Path, prompts: list[Prompt]) -> np.ndarray:
    """u (n,) of each prompt."""
    model, tokenizer = elsteer.load(landscape.fingerprint.name, dtype=fast_dtype())
    heard: list[Tensor] = []

    def listening(layer: int):  # type: ignore[no-untyped-def]
        move = landscape.descent(layer)

        def delta(states: Tensor, _strength=1.0, context=None, due=None) -> Tensor:  # type: ignore[no-untyped-def]
            heard.append(move.due(states, context) if due is None else due)
            return torch.zeros_like(states, dtype=torch.float32)

        move.delta = delta
        return move

    landscape.attach(model, 0.0, tokenizer=tokenizer).remove()  # an error where it is of another model
    found, done = np.full(len(prompts), math.nan), 0
    caches = PromptCaches(model, tokenizer, prompts, batch_size=64, room=1, keep_bytes=0, folder=run)
    with torch.inference_mode(), Steering(model, {at: listening(at) for at in landscape.rule.layers}, window=0):
        for batch in caches.batches(range(len(prompts))):
            first_logits(model, batch)
            found[batch.rows], done = heard[-1].numpy(), done + len(batch.rows)
            sys.stderr.write(f"\rreading the dev prompts: {done}/{len(prompts)}")
    sys.stderr.write("\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--weights", type=float, nargs="+", default=[6.3, 16.0, 25.0])
    parser.add_argument("--points", type=float, nargs="+", default=[8.0, 5.0, 3.0])
    options = parser.parse_args()
    run, landscape = options.run, Landscape.from_pretrained(options.run / "landscape")
    rows = [row for row in read_jsonl(run / "prompts.jsonl") if row.pop("split") == "dev"]
    prompts, plain = [Prompt.from_row(row) for row in rows], read_completions(run / "dev.jsonl")
    due = due_of(landscape, run, prompts)
    harmful = np.array([one.harmful for one in prompts])
    refused = np.array([plain[one.id].label == "refusal" for one in prompts])
    fitted = landscape.provenance["dev"]["rule"]["benign_weight"]
    gain = FitSettings.read(run / "settings.yaml").training.refine_gain

    by_source: dict[tuple[str, bool], list[int]] = defaultdict(list)
    for at, one in enumerate(prompts):
        by_source["under attack" if under_attack(one) else one.source, one.harmful].append(at)
    lines = ["| source | | n | refused, plain |" + "".join(f" w = {weight:g} |" for weight in options.weights)]
    lines += ["|---|---|---|---|" + "---|" * len(options.weights)]
    for (source, kind), places in sorted(by_source.items()):
        above = [np.mean(due[places] > gain * math.log(weight / fitted)) for weight in options.weights]
        cells = [source, "harmful" if kind else "benign", str(len(places)), f"{refused[places].mean():.1%}"]
        lines.append("| " + " | ".join([*cells, *(f"{share:.1%}" for share in above)]) + " |")
    lines += ["", "| harmful refusals, points | false refusals removed, net |", "|---|---|"]
    false = refused & ~harmful
    for points in options.points:
        share = min(1.0, refused[harmful].mean() + points / 100)
        above = due > np.quantile(due[harmful], 1 - share)
        net = 1 - (above & ~harmful).sum() / false.sum()
        lines.append(f"| {points:+g} | {net:.1%} of {false.sum()} |")
    print("\n".join(lines))  # noqa: T201


if __name__ == "__main__":
    main()
