"""torch.compile before or after attaching, whole models and single blocks. One-layer models: compiling is slow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig, PreTrainedModel

from elsteer.models import decoder_blocks
from elsteer.steering import Steering
from slow import energy_moves, pad, slow_generate, slow_logits
from tiny import tiny_model

PROMPTS = [[5, 9, 33, 71, 12], [40, 41], [7, 88, 21, 3, 3, 60, 61, 90, 14]]
PROMPT = PROMPTS[2]
pytestmark = pytest.mark.usefixtures("_clean_compiler")


@pytest.fixture
def _clean_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Not empty once the compiler has traced steering: else the test would show nothing."""
    seen: list[int] = []
    plain = Steering._before_compiled

    def note(self: Steering, inputs: Tensor, *args: Any) -> None:
        if not seen:  # a list that grows would make the compiler start anew each time
            seen.append(1)
        plain(self, inputs, *args)

    monkeypatch.setattr(Steering, "_before_compiled", note)
    return seen


def small() -> PreTrainedModel:
    return tiny_model(num_hidden_layers=1)


def logits_of(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def compiled(model: PreTrainedModel, way: str) -> Any:
    if way == "model.forward":
        model.forward = torch.compile(model.forward, backend="eager")
    elif way == "model.compile()":
        model.compile(backend="eager")
    elif way == "blocks":
        for block in decoder_blocks(model):
            block.compile(backend="eager")
    else:
        return torch.compile(model, backend="eager")
    return model


@pytest.mark.parametrize(
    ("way", "when"),
    [
        ("torch.compile(model)", "before"),
        ("model.compile()", "after"),
        ("model.forward", "before"),
        ("blocks", "before"),
    ],
)
def test_a_compiled_model_is_steered_and_plain_again(way: str, when: str) -> None:
    model, moves, inputs = small(), energy_moves((0,)), pad(PROMPTS)
    plain = logits_of(model, **inputs)
    wanted = torch.stack([slow_logits(model, moves, p, len(p) - 1, 2)[-1] for p in PROMPTS])
    runner: Any = model
    if when == "before":  # compiled, and run, before steering is attached
        runner = compiled(model, way)
        torch.testing.assert_close(logits_of(runner, **inputs), plain, atol=1e-5, rtol=0)
    with Steering(runner, moves, window=2) as steering:
        if when == "after":
            runner = compiled(model, way)
        torch.testing.assert_close(logits_of(runner, **inputs)[:, -1], wanted, atol=1e-4, rtol=0)
        steering.disable()
        torch.testing.assert_close(logits_of(runner, **inputs), plain, atol=1e-5, rtol=0)
        steering.enable()
        torch.testing.assert_close(logits_of(runner, **inputs)[:, -1], wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits_of(runner, **inputs), plain, atol=1e-5, rtol=0)


def test_strengths_of_a_compiled_model() -> None:
    model, moves, inputs = small(), energy_moves((0,)), pad(PROMPTS)
    runner = torch.compile(model, backend="eager")
    strengths = [0.5, 0.0, 2.0]
    wanted = torch.stack(
        [slow_logits(model, moves, p, len(p) - 1, 2, s)[-1] for p, s in zip(PROMPTS, strengths, strict=True)]
    )
    with Steering(runner, moves, window=2, strength=torch.tensor(strengths)) as steering:
        torch.testing.assert_close(logits_of(runner, **inputs)[:, -1], wanted, atol=1e-4, rtol=0)
        steering.strength = 0.5
        torch.testing.assert_close(logits_of(runner, **inputs)[0, -1], wanted[0], atol=1e-4, rtol=0)
        steering.strength = 2.0
        torch.testing.assert_close(logits_of(runner, **inputs)[2, -1], wanted[2], atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}], ids=str)
def test_generate_of_a_compiled_model(options: dict[str, Any], traced: list[int]) -> None:
    model, moves = small(), energy_moves((0,))
    model.compile(backend="eager")
    with Steering(model, moves, window=1):
        for prompts in (PROMPTS, [PROMPT])[: 1 if "prefill_chunk_size" in options else 2]:
            inputs = pad(prompts)
            out = model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, **options)
            found = out[:, inputs["input_ids"].shape[1] :].tolist()
            assert found == [slow_generate(small(), moves, prompt, 3, 1, ends=()) for prompt in prompts]
    assert traced


def test_compiling_into_one_graph(traced: list[int]) -> None:
    """No graph break is needed: what runs fast compiled still does."""
    model, moves = small(), energy_moves((0,))
    runner = torch.compile(model, backend="aot_eager", fullgraph=True)
    with Steering(model, moves, window=2):
        found = logits_of(runner, input_ids=torch.tensor([PROMPT]))
    wanted = slow_logits(model, moves, PROMPT, len(PROMPT) - 1, 2)
    torch.testing.assert_close(found[0], wanted, atol=1e-4, rtol=0)
    assert traced


def test_a_compiled_model_where_the_ends_are_told(traced: list[int]) -> None:
    model, moves, answer = small(), energy_moves((0,)), [9, 8, 7, 6]
    runner = torch.compile(model, backend="eager")
    lengths = torch.tensor([len(prompt) for prompt in PROMPTS])
    inputs = pad([[*prompt, *answer] for prompt in PROMPTS])
    with Steering(runner, moves, window=1) as steering, steering.prompts(lengths):
        found = logits_of(runner, **inputs)
    for row, prompt in enumerate(PROMPTS):
        kept = found[row][inputs["attention_mask"][row].bool()]
        wanted = slow_logits(model, moves, [*prompt, *answer], len(prompt) - 1, 1)
        torch.testing.assert_close(kept, wanted, atol=1e-4, rtol=0)
    assert traced


def test_generate_that_compiles_by_itself() -> None:
    """With a static cache transformers compiles the decoding step on its own on accelerators; asked to, here too."""
    model, moves = small(), energy_moves((0,))
    config = CompileConfig(backend="eager", fullgraph=False, mode=None)
    config._compile_all_devices = True

    def made() -> list[list[int]]:
        out = model.generate(
            **pad(PROMPTS), max_new_tokens=4, do_sample=False, eos_token_id=None,
            cache_implementation="static", compile_config=config,
        )  # fmt: skip
        return out[:, len(PROMPT) :].tolist()

    plain = [slow_generate(small(), {}, prompt, 4, 1, ends=()) for prompt in PROMPTS]
    steered = [slow_generate(small(), moves, prompt, 4, 1, ends=()) for prompt in PROMPTS]
    assert made() == plain
    assert hasattr(model, "_compiled_call")
    with Steering(model, moves, window=1):
        assert made() == steered != plain
    assert made() == plain


def test_decoding_compiles_once_and_without_a_graph_break() -> None:
    """Two passes of a static cache have their shapes: the prompt's and one token's. No token after that compiles again."""
    model, moves = small(), energy_moves((0,))
    config = CompileConfig(backend="eager", fullgraph=False, mode=None)
    config._compile_all_devices = True

    def made(new: int) -> tuple[list[list[int]], int]:
        out = model.generate(
            **pad(PROMPTS), max_new_tokens=new, do_sample=False, eos_token_id=None,
            cache_implementation="static", compile_config=config,
        )  # fmt: skip
        return out[:, len(PROMPT) :].tolist(), counters["stats"]["unique_graphs"]

    counters.clear()
    with Steering(model, moves, window=3) as steering:
        first, graphs = made(8)
        again, after = made(8)
        steering.strength = 1.0
        assert made(8) == (first, graphs)
    assert first == again == [slow_generate(small(), moves, prompt, 8, 3, ends=()) for prompt in PROMPTS]
    assert 0 < graphs == after
    assert graphs <= 2
    assert not counters["graph_break"], dict(counters["graph_break"])
