"""The whole fit against the straightforward pipeline, stage by stage, same model and prompts.

    .venv/bin/python benchmarks/bench_fit.py

Straightforward: `generate` in batches of 8 with answers of full length (128 tokens), no prefix shared; a second pass for the
states (`output_hidden_states`); the paper's network and loop for one layer after the other (`bench_train`); each trial of the
tuning answers the dev prompts anew, prefill included. What repeats is timed on a sample and multiplied by how often it
happens, as the table says: 32 prompts for answers and states, two epochs of one layer for the training. elsteer's own fit is
run whole, in an empty folder. `fit.ratio`: straightforward over ours.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from bench_train import EPOCHS, paper_layer
from side_by_side import keep, no_options, peak_memory, show

import elsteer
from elsteer.demo import MODEL, fast_dtype
from elsteer.errors import NothingHelps
from elsteer.evaluation.figures import Figure, machine
from elsteer.files import read_jsonl
from elsteer.models import left_pad, num_layers
from elsteer.models.chat import encode_chat
from elsteer.prompts import load_starter, sample
from elsteer.settings import CollectSettings, FitSettings

COMMAND = "python benchmarks/bench_fit.py"
TRAIN, DEV, SAMPLE, LENGTH, BATCH, TIMED = 256, 96, 32, 128, 8, 2


def main() -> None:
    model, tokenizer = elsteer.load(MODEL, dtype=fast_dtype())
    train, dev = sample(load_starter("train"), TRAIN, 0), sample(load_starter("dev"), DEV, 0)
    ours: dict[str, float] = defaultdict(float)
    memory: dict[str, float] = defaultdict(float)
    last = time.perf_counter()

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        ours[stage] += now - last
        last = now
        memory[stage] = max(memory[stage], peak[0])
        peak[0] = 0.0

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, peak_memory() as peak:
        try:
            elsteer.fit(
                model,
                tokenizer,
                train,
                dev=dev,
                run_dir=folder,
                settings=FitSettings(collect=CollectSettings(full_answers=64)),
                progress=progress,
            )
        except NothingHelps as error:  # so few prompts may not do: the time is what is measured
            sys.stdout.write(f"{error}\n")
        trials = [row["trial"] for row in read_jsonl(Path(folder) / "frontier.jsonl")]
    whole = time.perf_counter() - start

    rows = [encode_chat(tokenizer, list(one.messages)) for one in sample(train, SAMPLE, 1)]
    batches = [left_pad(rows[at : at + BATCH], tokenizer.pad_token_id) for at in range(0, SAMPLE, BATCH)]
    with torch.inference_mode():
        start = time.perf_counter()
        for ids, mask in batches:
            model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                do_sample=False,
                max_new_tokens=LENGTH,
                pad_token_id=tokenizer.pad_token_id,
            )
        answer = (time.perf_counter() - start) / SAMPLE
        start = time.perf_counter()
        for ids, mask in batches:
            model(ids.to(model.device), attention_mask=mask.to(model.device), output_hidden_states=True)
        state = (time.perf_counter() - start) / SAMPLE
    depth, size = num_layers(model), int(model.config.hidden_size)
    start = time.perf_counter()
    paper_layer(torch.randn(TRAIN, size), torch.arange(TRAIN) % 2 == 0, TIMED)
    layer = (time.perf_counter() - start) / TIMED * EPOCHS

    plain = {
        "answers": (answer, TRAIN + DEV, "prompts"),
        "states": (state, TRAIN + DEV, "prompts"),
        "training": (layer, depth, "layers"),
        "tuning": (answer * DEV, len(trials), "trials"),
    }
    total = sum(each * times for each, times, _ in plain.values())
    show(
        ["straightforward", "seconds each", "times", "", "seconds"],
        [[name, f"{each:.2f}", times, what, f"{each * times:.0f}"] for name, (each, times, what) in plain.items()],
    )
    show(
        ["elsteer's fit", "seconds", "peak MiB"],
        [[name, f"{value:.0f}", f"{memory[name]:.0f}"] for name, value in ours.items()],
    )
    note = f"{TRAIN} training and {DEV} dev prompts, {len(trials)} trials; straightforward {total:.0f} s, ours {whole:.0f} s"
    found = [Figure("fit.ratio", total / whole, COMMAND, 0, MODEL, machine(), note=note)]
    most = max(memory, key=lambda stage: memory[stage])
    beyond = f"anonymous pages beyond the model's, while {most}; {note}"
    found.append(Figure("fit.peak_memory_mib", memory[most], COMMAND, 0, MODEL, machine(), note=beyond))
    parts = {
        "answers": ("answering", "first tokens"),
        "training": ("training",),
        "tuning": ("screening", "judging", "checking"),
    }
    for name, starts in parts.items():
        mine = sum(value for stage, value in ours.items() if stage.startswith(starts))
        before = sum(plain[one][0] * plain[one][1] for one in ((name, "states") if name == "answers" else (name,)))
        found.append(Figure(f"fit.{name}.ratio", before / max(1e-9, mine), COMMAND, 0, MODEL, machine(), note=note))
    show(["figure", "value"], [[one.name, f"{one.value:.1f}"] for one in found])
    keep("fit", found)


if __name__ == "__main__":
    no_options(__doc__)
    main()
