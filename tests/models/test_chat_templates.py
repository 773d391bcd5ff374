"""Chats become ids exactly once, with one BOS, the system prompt in and the answer about to start."""

from __future__ import annotations

import sys

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from elsteer.errors import ModelError
from elsteer.models import context_length, effective_thinking, encode_chat, left_pad, render_chat, template_hash
from tiny import TEMPLATES, VOCABULARY, tiny_model, tiny_tokenizer

FAMILIES = [name for name in TEMPLATES if name != "none"]
USER = [{"role": "user", "content": "How do I kill a Python process?"}]
EXPECTED = {
    "chatml": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHow do I kill a Python "
    "process?<|im_end|>\n<|im_start|>assistant\n",
    "qwen3": "<|im_start|>user\nHow do I kill a Python process?<|im_end|>\n<|im_start|>assistant\n",
    "llama-3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHow do I kill a Python process?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "llama-2": "<s>[INST] How do I kill a Python process? [/INST]",
    "mistral": "<s>[INST] How do I kill a Python process? [/INST]",
    "gemma": "<bos><start_of_turn>user\nHow do I kill a Python process?<end_of_turn>\n<start_of_turn>model\n",
    "phi-3": "<|user|>\nHow do I kill a Python process?<|end|>\n<|assistant|>\n",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_template_is_applied_once(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    assert tokenizer.decode(encode_chat(tokenizer, USER)) == EXPECTED[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_bos_is_doubled_where_the_tokenizer_adds_one_by_itself(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    bos = tokenizer.bos_token_id
    ids = encode_chat(tokenizer, USER)
    written = EXPECTED[family].startswith(tokenizer.bos_token or "\0")
    assert ids.count(bos) == (1 if written else 0)
    assert ids == tokenizer.apply_chat_template(USER, add_generation_prompt=True)["input_ids"]
    if TEMPLATES[family][4] and written:  # the mistake that this guards against, so that the test can fail
        assert tokenizer(EXPECTED[family])["input_ids"].count(bos) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_system_prompt_is_in_once_in_every_family(family: str) -> None:
    text = render_chat(tiny_tokenizer(family), USER, system="Answer in French.")
    assert text.count("Answer in French.") == 1
    assert "helpful assistant" not in text
    assert text.index("Answer in French.") < text.index("How do I kill")


@pytest.mark.parametrize("family", ["gemma", "mistral"])
def test_without_a_system_role_the_system_prompt_stands_before_the_first_message(family: str) -> None:
    text = render_chat(tiny_tokenizer(family), USER, system="Answer in French.")
    assert "Answer in French.\n\nHow do I kill a Python process?" in text


def test_a_template_that_drops_the_system_prompt_in_silence_gets_it_in_the_first_message() -> None:
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% for m in messages if m['role'] != 'system' %}{{ m['role'] + ':' + m['content'] }}{% endfor %}"
    )
    assert render_chat(tokenizer, USER, system="Be brief.") == "user:Be brief.\n\nHow do I kill a Python process?"


def test_a_chat_keeps_its_own_system_prompt() -> None:
    chat = [{"role": "system", "content": "Mine."}, *USER]
    text = render_chat(tiny_tokenizer("chatml"), chat, system="Yours.")
    assert "Mine." in text
    assert "Yours." not in text


@pytest.mark.parametrize("family", FAMILIES)
def test_a_longer_chat_ends_where_the_assistant_answers(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    chat = [*USER, {"role": "assistant", "content": "With kill."}, {"role": "user", "content": "And in Rust?"}]
    text = tokenizer.decode(encode_chat(tokenizer, chat))
    assert text.index("With kill.") < text.index("And in Rust?")
    assert text.endswith(EXPECTED[family].rpartition("process?")[2])


def test_thinking_is_passed_where_the_template_knows_it() -> None:
    tokenizer = tiny_tokenizer("qwen3")
    assert render_chat(tokenizer, USER, thinking=False).endswith("<think>\n\n</think>\n\n")
    assert not render_chat(tokenizer, USER, thinking=True).endswith("</think>\n\n")
    assert render_chat(tokenizer, USER) == render_chat(tokenizer, USER, thinking=True)
    assert [effective_thinking(tokenizer, value) for value in (True, False, None)] == [True, False, None]


def test_thinking_is_ignored_where_the_template_does_not_know_it() -> None:
    tokenizer = tiny_tokenizer("chatml")
    assert encode_chat(tokenizer, USER, thinking=True) == encode_chat(tokenizer, USER)
    assert effective_thinking(tokenizer, True) is None


def test_a_tokenizer_without_a_template_says_what_to_do() -> None:
    with pytest.raises(ModelError, match="--chat-template FILE"):
        encode_chat(tiny_tokenizer("none"), USER)
    with pytest.raises(ModelError, match="--chat-template FILE"):
        template_hash(tiny_tokenizer("none"))


@pytest.mark.parametrize(
    "chat", [[], [{"role": "assistant", "content": "Hm."}, {"role": "assistant", "content": "Hm."}]]
)
def test_a_chat_that_the_template_refuses_is_one_sentence(chat: list[dict[str, str]]) -> None:
    with pytest.raises(ModelError, match="does not take this chat"):
        encode_chat(tiny_tokenizer("mistral" if chat else "chatml"), chat)


def test_text_that_looks_like_a_special_token_is_read_as_the_template_reads_it() -> None:
    tokenizer = tiny_tokenizer("chatml")
    chat = [{"role": "user", "content": "What does <|im_end|> mean?"}]
    assert encode_chat(tokenizer, chat) == tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]


def test_templates_are_told_apart_by_their_hash() -> None:
    hashes = {template_hash(tiny_tokenizer(family)) for family in FAMILIES}
    assert len(hashes) == len(FAMILIES)
    assert template_hash(tiny_tokenizer("gemma")) == template_hash(tiny_tokenizer("gemma"))


def test_of_several_named_templates_the_default_counts() -> None:
    tokenizer = tiny_tokenizer("chatml")
    plain, text = template_hash(tokenizer), render_chat(tokenizer, USER)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ 'tools' }}"}
    assert template_hash(tokenizer) == plain
    assert render_chat(tokenizer, USER) == text


def test_rows_are_padded_on_the_left() -> None:
    ids, mask = left_pad([[1, 2, 3], [4], []], pad_id=9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4], [9, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 0]]
    assert left_pad([], 0)[0].shape == (0, 0)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "falcon"])
def test_the_context_length_is_read_from_the_configuration(family: str) -> None:
    model = tiny_model(family)
    assert context_length(model) == 256


def test_a_model_without_a_limit_has_none() -> None:
    config = AutoConfig.for_model("bloom", vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    assert context_length(AutoModelForCausalLM.from_config(config)) == sys.maxsize
