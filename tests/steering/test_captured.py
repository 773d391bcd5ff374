"""Steps of fixed shapes: what CUDA graphs capture, and what is left of steering in compiled code past the window."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, PreTrainedModel, StaticCache

from elsteer.steering import Steering, attach
from slow import energy_moves, pad, slow_generate
from tiny import tiny_model

PROMPTS = [[5, 9, 33, 71, 12], [7, 88, 21, 3, 3]]
NEW = 6
GPU = torch.cuda.is_available()


class NoLook(TorchDispatchMode):
    """Fails where the host reads a value of a tensor, or a shape depends on one: a CUDA graph can hold neither."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero"), f"{name} looks at values"
        if name == "index":
            assert all(at is None or at.dtype != torch.bool for at in args[1]), "an index by a mask looks at values"
        return func(*args, **(kwargs or {}))


class Stepper:
    """Greedy decoding of equally long prompts by one step with fixed buffers, which `capture` may put into a graph."""

    def __init__(self, model: PreTrainedModel, rows: int, width: int) -> None:
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=width + NEW + 1)
        self.token = torch.zeros(rows, 1, dtype=torch.long, device=model.device)
        self.position = torch.zeros(rows, 1, dtype=torch.long, device=model.device)
        self.run: Callable[[], object] = self.step

    def step(self) -> None:
        logits = self.model(input_ids=self.token, position_ids=self.position, past_key_values=self.cache).logits
        self.token.copy_(logits[:, -1].argmax(dim=-1, keepdim=True))
        self.position.add_(1)

    def begin(self, prompts: list[list[int]]) -> None:
        ids = torch.tensor(prompts, device=self.model.device)
        for layer in self.cache.layers:
            if layer.is_initialized:
                layer.cumulative_length.fill_(0)
        logits = self.model(input_ids=ids, past_key_values=self.cache).logits
        self.token.copy_(logits[:, -1].argmax(dim=-1, keepdim=True))
        self.position.fill_(ids.shape[1])

    @torch.no_grad()
    def generate(self, prompts: list[list[int]]) -> list[list[int]]:
        self.begin(prompts)
        found = [self.token.clone()]
        for _ in range(NEW - 1):
            self.run()
            found.append(self.token.clone())
        return torch.cat(found, dim=1).tolist()


def wanted(prompts: list[list[int]], window: int) -> list[list[int]]:
    return [slow_generate(tiny_model(), energy_moves(), prompt, NEW, window, ends=()) for prompt in prompts]


@pytest.mark.parametrize("window", [0, 2, NEW])
def test_a_step_that_looks_at_no_value(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said to be capturing: there is no GPU where these tests run. `test_a_captured_step` is for where there is one."""
    with Steering(tiny_model(), energy_moves(), window=window) as steering:
        stepper = Stepper(steering.model, len(PROMPTS), len(PROMPTS[0]))

        def step() -> None:
            with monkeypatch.context() as patch, NoLook():
                patch.setattr(attach, "_recording", lambda: True)
                stepper.step()

        stepper.run = step
        assert stepper.generate(PROMPTS) == wanted(PROMPTS, window)
        assert steering._starts is not None
        where = steering._starts.data_ptr()
        assert stepper.generate(PROMPTS[::-1]) == wanted(PROMPTS[::-1], window)
        assert steering._starts.data_ptr() == where, "a captured graph would go on reading the old place"


@pytest.mark.skipif(not GPU, reason="no GPU")
@pytest.mark.parametrize("window", [0, 2, NEW])
def test_a_captured_step(window: int) -> None:
    model = tiny_model().to("cuda")
    with Steering(model, energy_moves(), window=window), torch.no_grad():
        stepper = Stepper(model, len(PROMPTS), len(PROMPTS[0]))
        stepper.begin(PROMPTS)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            stepper.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            stepper.step()
        stepper.run = graph.replay
        for prompts in (PROMPTS, PROMPTS[::-1]):
            assert stepper.generate(prompts) == wanted(prompts, window)


@pytest.fixture
def _clean_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_clean_compiler")
@pytest.mark.parametrize("window", [0, 2])
def test_past_the_window_compiled_code_is_the_plain_models(window: int) -> None:
    made: list[list[str]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        made.append([str(node.target) for node in graph.graph.nodes if node.op.startswith("call")])
        return graph.forward

    config = CompileConfig(backend=backend, fullgraph=False, mode=None)
    config._compile_all_devices = True
    model = tiny_model(num_hidden_layers=1)

    def generated() -> list[list[int]]:
        out = model.generate(
            **pad(PROMPTS), max_new_tokens=NEW, do_sample=False, eos_token_id=None,
            cache_implementation="static", compile_config=config,
        )  # fmt: skip
        return out[:, len(PROMPTS[0]) :].tolist()

    generated()
    plain = made[-1]
    made.clear()
    with Steering(model, energy_moves((0,)), window=window):
        found = generated()
        assert found == [
            slow_generate(tiny_model(num_hidden_layers=1), energy_moves((0,)), prompt, NEW, window, ends=())
            for prompt in PROMPTS
        ]
        assert made[-1] == plain
        assert len(made) == (1 if window == 0 else 2)
        assert generated() == found
        assert len(made) == (1 if window == 0 else 2), "compiled once more"
