"""The model `elsteer` of the LM Evaluation Harness (lm-eval 0.4.13): any of its tasks, on a steered model.

    python -m elsteer.plugins.lm_eval run --model elsteer --apply_chat_template --tasks arc_challenge
        --model_args pretrained=ID,landscape=PATH,strength=1.0

    from elsteer.plugins.lm_eval import ElsteerLM        # registers the name too
    lm_eval.simple_evaluate(model=ElsteerLM(model, landscape, tokenizer=tokenizer), tasks=[...], apply_chat_template=True)

The harness has no entry points for models, so this module registers its own and then runs the harness's command line.

Log-likelihoods: steering moves the context's last token (and as many tokens after it as the landscape's window says). The
harness counts white space at a context's end to the continuation, which would take the newline that ends most chat templates
for a part of the answer: what is steered is the last token of the whole context, and what is summed is what the harness
sums. With strength 0 all is the harness's own class HFLM, to the bit.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elsteer.errors import ElsteerError, SteeringError
from elsteer.landscape import Landscape
from elsteer.models import load, render_chat
from elsteer.steering.inputs import as_strength

__all__ = ["ElsteerLM", "main"]

Request = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("elsteer")
class ElsteerLM(HFLM):
    """HFLM with a landscape attached for as long as it lives; `steering` is the handle, to detach it earlier.

    pretrained: what `elsteer.load` takes (hub id, folder, GGUF file) or a model that is loaded, then with its tokenizer.
    landscape: a folder, a hub id or a Landscape. strength: default the landscape's. device: cpu, cuda, cuda:1.
    options: those of HFLM that work on a loaded model, such as batch_size (a number), max_length, softmax_dtype.
    Raises SteeringError for an option that HFLM would ignore, LandscapeError where the landscape does not fit.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel | None = None,
        landscape: str | Landscape | None = None,
        strength: float | str | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str | None = 1,
        **options: Any,
    ) -> None:
        if ignored := sorted(name for name, value in options.items() if value and name not in _OPTIONS):
            raise SteeringError(
                f"The model elsteer does not take {ignored[0]}: it takes pretrained, landscape, strength, revision, "
                f"dtype, device, batch_size, {', '.join(_OPTIONS)}."
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # each process would run the whole task
            raise SteeringError(
                "The model elsteer runs in one process: start lm-eval without accelerate launch or torchrun."
            )
        try:
            size = 1 if batch_size is None else int(batch_size)
        except ValueError:
            size = 0
        if size < 1:
            raise SteeringError(
                f"The model elsteer needs a number for --batch_size, 1 or more, not {batch_size}: auto cannot be used."
            )
        if pretrained is None:
            raise SteeringError("The model elsteer needs a model: give pretrained=MODEL in --model_args.")
        if landscape is None:
            raise SteeringError("The model elsteer needs a landscape: give landscape=PATH in --model_args.")
        steps = None if strength is None else as_strength(strength)
        read = landscape if isinstance(landscape, Landscape) else Landscape.from_pretrained(landscape)
        if isinstance(pretrained, str):
            revision = revision or read.fingerprint.revision_of(pretrained)
            if (
                device == "cuda:0" and not torch.cuda.is_available()
            ):  # the harness's default: HFLM takes what there is, too
                device = None
            pretrained, tokenizer = load(pretrained, revision=revision, dtype=dtype, device=device)
        elif tokenizer is None:
            raise SteeringError(
                "Give the tokenizer of the model that is loaded: ElsteerLM(model, landscape, tokenizer=...)."
            )
        asked = read.asked_with  # steering is fitted to where such a chat ends
        if asked.get("thinking") is False:
            options.setdefault("enable_thinking", False)
        elif (
            asked.get("thinking") and "enable_thinking" not in options
        ):  # by that name the harness wants a token that ends it
            options["chat_template_args"] = {"enable_thinking": True, **(options.get("chat_template_args") or {})}
        super().__init__(pretrained=pretrained, tokenizer=tokenizer, batch_size=size, **options)
        self.landscape, self.system = read, asked.get("system")
        self.steering = read.attach(pretrained, steps, tokenizer=tokenizer)
        plain_again = weakref.finalize(self, self.steering.remove)  # a model of the caller's own
        plain_again.atexit = False  # type: ignore[misc]

    @property
    def _plain(self) -> bool:
        return not bool(torch.as_tensor(self.steering.strength).any()) or not self.steering.enabled

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """As in HFLM, with the fit's system prompt before a chat that has none of its own."""
        if self.system and not (chat_history and chat_history[0]["role"] == "system"):
            chat_history = [{"role": "system", "content": self.system}, *chat_history]
        if add_generation_prompt and set(self.chat_template_args) <= {"enable_thinking"}:
            # It finds a place where there is no role for it, too.
            return render_chat(self.tokenizer, chat_history, thinking=self.chat_template_args.get("enable_thinking"))
        if [one["role"] for one in chat_history[:2]] == ["system", "user"] and not self._takes(chat_history[:2]):
            words = "\n\n".join(one["content"] for one in chat_history[:2])  # HFLM would leave the system's out
            chat_history = [{"role": "user", "content": words}, *chat_history[2:]]
        return str(super().apply_chat_template(chat_history, add_generation_prompt))

    def _takes(self, chat: list[dict[str, str]]) -> bool:
        """Whether the template has a place for the chat's system message."""
        try:
            text = self.tokenizer.apply_chat_template(chat, tokenize=False, **self.chat_template_args)
        except (TemplateError, LookupError, ValueError, TypeError):
            return False
        return chat[0]["content"].strip() in text

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As in HFLM at strength 0. Raises SteeringError at any other: a text by itself has no prompt whose end is steered."""
        if not self._plain:
            raise SteeringError(
                "This task scores whole texts without a prompt, of which no token is steered: run it with strength=0, or "
                "choose another task."
            )
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding gives it) of each request's continuation.

        Requests whose inputs and prompt's end are the same share a pass: the letters of a multiple choice.
        """
        if self._plain:
            found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            return found
        passes: dict[tuple[tuple[int, ...], int], list[int]] = defaultdict(list)
        for at, request in enumerate(requests):
            passes[self._input(request)].append(at)
        order = sorted(passes, key=lambda key: (-len(key[0]), key))
        size = override_bs or int(self.batch_size)
        answers: list[tuple[float, bool] | None] = [None] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        with bar:
            for start in range(0, len(order), size):
                keys = order[start : start + size]
                width = len(keys[0][0])
                ids = torch.tensor([[*row, *[0] * (width - len(row))] for row, _ in keys], device=self.device)
                with self.steering.prompts(torch.tensor([end for _, end in keys], device=self.device)):
                    logits = self._model_call(ids)  # pads stand on the right, where no real token sees them
                logs = F.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)
                for key, row in zip(keys, logs, strict=True):
                    for at in passes[key]:
                        answers[at] = self._answer(row[: len(key[0])], requests[at])
                        bar.update()
        return [one for one in answers if one is not None]

    def _input(self, request: Request) -> tuple[tuple[int, ...], int]:
        """The input tokens, cut on the left where they are too many, and how many of them are the prompt's."""
        text, context, continuation = request
        whole = context + continuation
        end = len(context)
        if text is not None and text[0] != text[0].rstrip():
            full = self.tok_encode(text[0])  # with the white space that the harness counts to the continuation
            if end < len(full) < len(whole) and whole[: len(full)] == full:
                end = len(full)
        cut = max(0, len(whole) - (self.max_length + 1))
        if cut >= end:
            raise SteeringError(
                f"A continuation of {len(continuation)} tokens leaves no room for its context in {self.max_length}: raise "
                "max_length, or leave this task out."
            )
        return tuple(whole[cut:-1]), end - cut

    def _answer(self, logs: torch.Tensor, request: Request) -> tuple[float, bool]:
        text, _, continuation = request
        logs = logs[-len(continuation) :]
        wanted = torch.tensor(continuation, device=logs.device)
        total = logs.gather(1, wanted[:, None]).sum()
        answer = float(total), bool((logs.argmax(dim=-1) == wanted).all())
        if text is not None:
            self.cache_hook.add_partial("loglikelihood", text, answer)
        return answer


_OPTIONS = (
    "max_batch_size",
    "max_length",
    "add_bos_token",
    "prefix_token_id",
    "softmax_dtype",
    "mixed_precision_dtype",
    "truncation",
    "think_end_token",
    "enable_thinking",
    "chat_template_args",
)


def main() -> None:
    """The harness's command line, with the model `elsteer`."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except ElsteerError as error:
        print(f"Error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
