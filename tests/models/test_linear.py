"""Linear layers on the CPU: the same numbers, whichever way round the product is taken."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from elsteer.models.linear import CpuLinear, speed_up_linears
from tiny import tiny_model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 7), (3, 1, 7), (5, 4, 7), (300, 7), (0, 7)])
def test_it_is_what_torch_computes(bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(7, 11, bias=bias)
    fast = nn.Sequential(nn.Linear(7, 11, bias=bias))
    fast[0].load_state_dict(plain.state_dict())
    assert speed_up_linears(fast) == 1
    x = torch.randn(shape)
    with torch.inference_mode():
        found, wanted = fast(x), plain(x)
    assert found.is_contiguous()
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_gradients_flow_as_before() -> None:
    layer = nn.Sequential(nn.Linear(4, 3))
    speed_up_linears(layer)
    layer(torch.randn(5, 4)).sum().backward()
    assert layer[0].weight.grad is not None


def test_other_kinds_of_layers_are_left_alone() -> None:
    class Adapter(nn.Linear):
        pass

    model = nn.ModuleList([Adapter(4, 4), nn.Linear(4, 4).to(torch.bfloat16), nn.Embedding(4, 4)])
    assert speed_up_linears(model) == 0
    assert type(model[0]) is Adapter


def test_a_model_keeps_its_logits_and_the_names_of_its_weights() -> None:
    plain, fast = tiny_model("qwen2"), tiny_model("qwen2")
    assert speed_up_linears(fast) > 10
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert any(isinstance(module, CpuLinear) for module in fast.modules())
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    with torch.inference_mode():
        torch.testing.assert_close(fast(ids).logits, plain(ids).logits, atol=1e-5, rtol=0)
