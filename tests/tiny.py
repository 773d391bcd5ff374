"""Tiny models and tokenizers made in code: all families that elsteer supports, no network, in milliseconds.

The weights are random but the same for the same seed on every machine that runs the same torch; the tokenizer spells
any text in bytes, so that no text is unknown to it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["FAMILIES", "TEMPLATES", "VOCABULARY", "tiny_gguf", "tiny_model", "tiny_tokenizer"]

VOCABULARY = 320  # 256 bytes and room for special tokens; models and tokenizer agree on it

_CHATML = (
    "{% if messages[0]['role'] == 'system' %}{{ '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% if not (loop.first and m['role'] == 'system') %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
_LLAMA3 = (
    "{% for m in messages %}{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' %}{% if loop.first %}{% set text = bos_token + text %}{% endif %}{{ text }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% set content = system + m['content'] if loop.first else m['content'] %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
_GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

# name: (template, bos, eos, further special tokens, whether the tokenizer adds a BOS by itself, as the real one does)
TEMPLATES: dict[str, tuple[str | None, str | None, str, list[str], bool]] = {
    "chatml": (_CHATML, None, "<|im_end|>", ["<|im_start|>"], False),
    "qwen3": (_QWEN3, None, "<|im_end|>", ["<|im_start|>", "<think>", "</think>"], False),
    "llama-3": (
        _LLAMA3,
        "<|begin_of_text|>",
        "<|eot_id|>",
        ["<|start_header_id|>", "<|end_header_id|>"],
        True,
    ),
    "llama-2": (_LLAMA2, "<s>", "</s>", [], True),
    "mistral": (_MISTRAL, "<s>", "</s>", ["[INST]", "[/INST]"], True),
    "gemma": (_GEMMA, "<bos>", "<end_of_turn>", ["<start_of_turn>"], True),
    "phi-3": (_PHI3, "<s>", "<|end|>", ["<|user|>", "<|assistant|>", "<|system|>"], True),
    "none": (None, "<s>", "</s>", [], True),
}

_DENSE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
_HEADS = {"head_dim": 8, "sliding_window": 64}
_IDS = {"bos_token_id": 257, "eos_token_id": 258, "pad_token_id": 256}

# family: (model_type, further settings)
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _DENSE),
    "mistral": ("mistral", _DENSE),
    "mixtral": ("mixtral", {**_DENSE, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "qwen2": ("qwen2", _DENSE),
    "qwen3": ("qwen3", {**_DENSE, "head_dim": 8}),
    "gemma2": ("gemma2", {**_DENSE, **_HEADS, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", {**_DENSE, **_HEADS, "query_pre_attn_scalar": 8}),
    "phi3": ("phi3", {**_DENSE, "original_max_position_embeddings": 256}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256, "tie_word_embeddings": False}),
    "gpt_neox": ("gpt_neox", {k: v for k, v in _DENSE.items() if k != "num_key_value_heads"}),
    "olmo2": ("olmo2", _DENSE),
    "falcon": ("falcon", {k: v for k, v in _DENSE.items() if k not in ("intermediate_size", "num_key_value_heads")}),
    "granite": ("granite", _DENSE),
}
FAMILIES: list[str] = list(_FAMILIES)


def tiny_tokenizer(template: str = "chatml") -> PreTrainedTokenizerFast:
    """A tokenizer of at most `VOCABULARY` ids: below 256 each is one byte, <pad> is 256, BOS 257 and EOS 258.

    template: one of TEMPLATES; its family's special tokens are single ids, and it adds a BOS by default where the
    family's own tokenizer does, which is what doubles a BOS in careless hands.
    """
    chat_template, bos, eos, special, adds_bos = TEMPLATES[template]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", bos or "<|endoftext|>", eos, *special]
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    vocabulary.update({name: len(letters) + i for i, name in enumerate(names)})
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, vocabulary[bos or ""])]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token="<pad>",
        extra_special_tokens=special,
        padding_side="left",
        model_max_length=256,
    )
    wrapped.chat_template = chat_template
    return wrapped


def tiny_model(family: str = "qwen2", seed: int = 0, **config: Any) -> PreTrainedModel:
    """A causal language model of 4 layers, hidden size 32, in float32 and eval mode, with random weights set by `seed`.

    family: one of FAMILIES. config: further settings of its configuration, such as num_hidden_layers=2 (n_layer=2 for
    gpt2). It is on the device ELSTEER_TEST_DEVICE, the CPU by default.
    """
    model_type, settings = _FAMILIES[family]
    made = AutoConfig.for_model(
        model_type, **{"vocab_size": VOCABULARY, "initializer_range": 0.1, **_IDS, **settings, **config}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    model.generation_config.pad_token_id = _IDS["pad_token_id"]
    return model.eval().requires_grad_(False).to(os.environ.get("ELSTEER_TEST_DEVICE", "cpu"))


def tiny_gguf(path: Path, seed: int = 0) -> PreTrainedModel:
    """Write a tiny Qwen2 with its chat tokenizer as an unquantised GGUF file; the model that was written."""
    model, tokenizer = tiny_model("qwen2", seed), tiny_tokenizer("chatml")
    config, layers = model.config, model.config.num_hidden_layers
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_name("tiny")
    writer.add_block_count(layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    unused = ["er", *(f"<unused{i}>" for i in range(1, VOCABULARY - len(words)))]  # one merge: no file has none
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*words, *unused])
    kinds = [gguf.TokenType.CONTROL if i >= 256 else gguf.TokenType.NORMAL for i in range(VOCABULARY)]
    writer.add_token_types(kinds)
    writer.add_token_merges(["e r"])
    writer.add_eos_token_id(_IDS["eos_token_id"])
    writer.add_pad_token_id(_IDS["pad_token_id"])
    writer.add_chat_template(str(tokenizer.chat_template))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, layers)
    for name, tensor in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
