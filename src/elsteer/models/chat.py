"""Chats to token ids: the template applied exactly once, left padding, context length."""

from __future__ import annotations

import hashlib
import logging
import re
import sys
from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elsteer.errors import ModelError
from elsteer.text import half_character

__all__ = ["context_length", "effective_thinking", "encode_chat", "left_pad", "render_chat", "template_hash"]

logger = logging.getLogger(__name__)

# What a template, or transformers before it, raises over a chat that it does not take.
_REFUSALS = (TemplateError, ValueError, IndexError, KeyError, TypeError)

Messages = Sequence[dict[str, str]]


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's (default) chat template. Raises ModelError where it has none."""
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several named templates
        template = template.get("default")
    if not template:
        raise ModelError(
            f"The tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template: "
            "take the instruct version of the model, or give a Jinja template with --chat-template FILE."
        )
    return str(template)


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the chat template's text. Raises ModelError where there is none."""
    return hashlib.sha256(chat_template(tokenizer).encode()).hexdigest()


def effective_thinking(tokenizer: PreTrainedTokenizerBase, thinking: bool | None) -> bool | None:
    """`thinking` where the template knows `enable_thinking`, else None: what is recorded with a landscape."""
    return thinking if re.search(r"\benable_thinking\b", chat_template(tokenizer)) else None


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *, system: str | None = None, thinking: bool | None = None
) -> str:
    """The chat as the model's text, up to where the assistant starts to answer. See `encode_chat`."""
    chat_template(tokenizer)
    options: dict[str, Any] = {}
    if (known := effective_thinking(tokenizer, thinking)) is not None:
        options["enable_thinking"] = known
    elif thinking is not None:
        logger.debug("the chat template knows no thinking mode; thinking=%s is ignored", thinking)
    chat = [dict(message) for message in messages]
    if any(half_character(str(text)) for text in (system or "", *(message.get("content") for message in chat))):
        raise ModelError("The chat holds bytes that are not UTF-8: write them as UTF-8.")
    if system and not (chat and chat[0]["role"] == "system"):
        chat = [{"role": "system", "content": system}, *chat]
    try:
        text = _apply(tokenizer, chat, options)
        # Some templates leave a system message out in silence: that would be another model than the user asked for.
        if chat[0]["role"] != "system" or chat[0]["content"].strip() in text:
            return text
        failure: Exception | None = None
    except _REFUSALS as error:
        failure = error
    if chat and chat[0]["role"] == "system" and len(chat) > 1 and chat[1]["role"] == "user":
        folded = {"role": "user", "content": chat[0]["content"] + "\n\n" + chat[1]["content"]}
        try:
            return _apply(tokenizer, [folded, *chat[2:]], options)
        except _REFUSALS as error:
            failure = error
    roles = ", ".join(message.get("role", "?") for message in chat) or "no message"
    raise ModelError(
        f"The chat template of {tokenizer.name_or_path or 'this model'} does not take this chat ({roles}): "
        f"{failure or 'it leaves the system message out'}."
    ) from failure


def _apply(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]], options: dict[str, Any]) -> str:
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **options))


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *, system: str | None = None, thinking: bool | None = None
) -> list[int]:
    """The chat as token ids that end where the assistant's answer begins.

    The template is applied once and it alone decides on special tokens, so that no BOS is doubled.
    messages: oldest first, each {"role": ..., "content": ...}.
    system: a system prompt for chats that do not begin with one of their own. Where the template has no system role
        (Gemma), it is set before the first user message, with a blank line between.
    thinking: True or False where the template knows a thinking mode (`enable_thinking`), ignored elsewhere; None leaves
        the template's own default. `effective_thinking` says what applied.
    Raises ModelError where the tokenizer has no template or the template refuses the chat.
    """
    text = render_chat(tokenizer, messages, system=system, thinking=thinking)
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def left_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask), each int64 of shape (rows, longest row), with `pad_id` and 0 on the left."""
    width = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        if row:
            ids[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
            mask[i, width - len(row) :] = 1
    return ids, mask


def context_length(model: PreTrainedModel) -> int:
    """The most tokens, prompt and answer together, that the configuration allows; sys.maxsize if it sets no limit."""
    config = model.config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx"):
        if isinstance(limit := getattr(config, name, None), int) and limit > 0:
            return limit
    return sys.maxsize
