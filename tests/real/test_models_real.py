"""The default model, as a user gets it."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elsteer.models import (
    Fingerprint,
    blocks_path,
    context_length,
    differences,
    encode_chat,
    fingerprint,
    hidden_size,
    left_pad,
    render_chat,
    source_of,
)

pytestmark = pytest.mark.real

Real = tuple[PreTrainedModel, PreTrainedTokenizerBase]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def answers(real: Real, chats: list[list[int]], tokens: int = 12) -> list[str]:
    model, tokenizer = real
    ids, mask = left_pad(chats, tokenizer.pad_token_id)
    made = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
    return tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)


def test_it_knows_the_capital_of_france(real: Real) -> None:
    assert "Paris" in answers(real, [encode_chat(real[1], QUESTION)])[0]


def test_a_padded_row_answers_as_it_does_alone(real: Real) -> None:
    _, tokenizer = real
    long = [{"role": "user", "content": "Count from one to five. " * 8}]
    short = encode_chat(tokenizer, QUESTION)
    assert answers(real, [encode_chat(tokenizer, long), short])[1] == answers(real, [short])[0]


def test_the_system_prompt_is_there_once_and_counts(real: Real) -> None:
    _, tokenizer = real
    assert render_chat(tokenizer, QUESTION).count("<|im_start|>system") == 1
    text = render_chat(tokenizer, QUESTION, system="You always answer in French.")
    assert text.count("<|im_start|>system") == 1
    assert "You are Qwen" not in text
    assert text.count("<|im_start|>") == 3
    assert text.endswith("<|im_start|>assistant\n")


def test_no_bos_is_added(real: Real) -> None:
    _, tokenizer = real
    ids = encode_chat(tokenizer, QUESTION)
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert tokenizer.bos_token_id not in ids
    assert ids == tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]


def test_its_shape_is_what_is_published(real: Real) -> None:
    model, tokenizer = real
    assert blocks_path(model) == "model.layers"
    assert (hidden_size(model), len(model.model.layers), context_length(model)) == (896, 24, 32768)
    assert model.dtype == torch.float32
    assert tokenizer.padding_side == "left"
    assert source_of(model)["origin"] in ("hub", "mirror")
    assert source_of(model)["revision"]


def test_it_is_recognised_in_bfloat16_and_told_from_its_neighbours(real: Real) -> None:
    model, tokenizer = real
    exact = fingerprint(model, tokenizer)
    rounded = {name: torch.tensor(values).to(torch.bfloat16).float().tolist() for name, values in exact.weights.items()}
    assert differences(exact, Fingerprint.from_dict({**exact.to_dict(), "weights": rounded})) == []
    noisy = {name: [value * 1.02 for value in values] for name, values in exact.weights.items()}
    assert differences(exact, Fingerprint.from_dict({**exact.to_dict(), "weights": noisy})) != []
