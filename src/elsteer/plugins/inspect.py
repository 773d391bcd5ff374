"""The model provider `elsteer` of Inspect (inspect_ai): its tasks, scorers and logs, on a steered model.

    inspect eval task.py --model elsteer/Qwen/Qwen2.5-Coder-0.5B-Instruct -M landscape=runs/demo/landscape -M strength=1.0

Inspect finds it by its entry point once elsteer is installed. Model arguments: landscape (a folder or a hub id), strength
(default the landscape's; 0 is the plain model), revision, dtype, device, thinking (default that of the fit, as is the system
prompt of a chat without one). Decoding is greedy unless a temperature is given; else the model's own generation settings hold.
One sample is answered at a time. What is not supported (tools, log probabilities, several choices, images) is refused.
"""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Any

import anyio
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    StopReason,
    modelapi,
)

from elsteer.errors import SteeringError

if TYPE_CHECKING:
    from inspect_ai.tool import ToolChoice, ToolInfo

__all__ = ["ElsteerAPI"]

_MAX_TOKENS = 512
_ARGUMENTS = ("landscape", "strength", "revision", "dtype", "device", "thinking")


@modelapi(name="elsteer")
class ElsteerAPI(ModelAPI):
    """A model with a landscape attached; `steering` is the handle.

    model_name: what `elsteer.load` takes. model_args: see the module. Raises SteeringError for an argument that is not known
    or a landscape that is not given, LandscapeError where it does not fit the model.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 - as in Inspect's own providers
        **model_args: Any,
    ) -> None:
        super().__init__(model_name=model_name, base_url=base_url, api_key=api_key, api_key_vars=[], config=config)
        if unknown := sorted(set(model_args) - set(_ARGUMENTS)):
            raise SteeringError(
                f"The provider elsteer does not know -M {unknown[0]}: it takes {', '.join(_ARGUMENTS)}."
            )
        if not model_args.get("landscape"):
            raise SteeringError("The provider elsteer needs a landscape: -M landscape=PATH.")
        import torch  # not loaded before a model is

        from elsteer.landscape import Landscape
        from elsteer.models import load
        from elsteer.run import key_of
        from elsteer.steering.inputs import as_strength

        given = model_args.get("strength")
        steps = None if given is None else as_strength(given)
        self.landscape = Landscape.from_pretrained(str(model_args["landscape"]))
        asked = self.landscape.asked_with  # steering is fitted to where such a chat ends
        self.thinking: bool | None = model_args.get("thinking", asked.get("thinking"))
        if self.thinking not in (True, False, None):  # a template would take any word for one or the other
            raise SteeringError(f"The provider elsteer's thinking is true or false, not {self.thinking!r}.")
        self.system: str | None = asked.get("system")
        self.model, self.tokenizer = load(
            model_name,
            revision=model_args.get("revision") or self.landscape.fingerprint.revision_of(model_name),
            dtype=model_args.get("dtype") or "auto",
            device=model_args.get("device"),
        )
        self.steering = self.landscape.attach(self.model, steps, tokenizer=self.tokenizer)
        # Inspect's cache tells models apart by name, base_url and configuration: not by -M.
        rule, steered = self.landscape.rule.to_dict(), float(torch.as_tensor(self.steering.strength))
        self.base_url = key_of(
            self.landscape.digest(),
            self.landscape.method,
            rule,
            steered,
            str(self.model.dtype),
            self.system,
            self.thinking,
        )
        self._lock = Lock()

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """The steered model's answer to the chat. Raises SteeringError for what is not supported."""
        for wanted, name in (
            (tools, "tools"),
            (config.logprobs, "log probabilities"),
            ((config.num_choices or 1) > 1, "several choices"),
        ):
            if wanted:
                raise SteeringError(f"The provider elsteer does not support {name}: leave them out of the task.")
        messages = [_plain(message) for message in input]
        return await anyio.to_thread.run_sync(self._answer, messages, config)

    def _answer(self, messages: list[dict[str, str]], config: GenerateConfig) -> ModelOutput:
        import torch

        from elsteer.completions import end_ids
        from elsteer.models import context_length, encode_chat

        if config.system_message and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": config.system_message}, *messages]
        ids = encode_chat(self.tokenizer, messages, system=self.system, thinking=self.thinking)
        wanted, room = config.max_tokens or _MAX_TOKENS, context_length(self.model) - len(ids)
        if room < 1:
            return self._output("", "model_length", len(ids), 0)
        limit = min(wanted, room)
        options: dict[str, Any] = {"max_new_tokens": limit, "do_sample": bool(config.temperature)}
        if config.temperature:
            given = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
            options |= {name: value for name, value in given.items() if value is not None}
        if config.stop_seqs:
            options |= {"stop_strings": list(config.stop_seqs), "tokenizer": self.tokenizer}
        row = torch.tensor([ids], device=self.model.device)
        with self._lock, torch.inference_mode():
            if config.seed is not None and config.temperature:
                torch.manual_seed(config.seed)
            made = self.model.generate(
                input_ids=row,
                attention_mask=torch.ones_like(row),
                pad_token_id=self.tokenizer.pad_token_id,
                **options,
            )
        tokens = made[0, len(ids) :].tolist()
        text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        ended = bool(tokens) and tokens[-1] in end_ids(self.model, self.tokenizer)
        # The last token may go on after a stop sequence, or be more than it.
        stops = [at for stop in config.stop_seqs or [] if (at := text.find(stop)) >= 0]
        if stops:
            text, ended = text[: min(stops)], True
        reason: StopReason = "stop"
        if len(tokens) >= limit and not ended:
            reason = "max_tokens" if limit == wanted else "model_length"
        return self._output(text.strip(), reason, len(ids), len(tokens))

    def _output(self, text: str, reason: StopReason, asked: int, made: int) -> ModelOutput:
        message = ChatMessageAssistant(content=text, model=self.model_name, source="generate")
        usage = ModelUsage(input_tokens=asked, output_tokens=made, total_tokens=asked + made)
        choice = ChatCompletionChoice(message=message, stop_reason=reason)
        return ModelOutput(model=self.model_name, choices=[choice], usage=usage)

    def max_tokens(self) -> int | None:
        """Tokens of an answer where the task does not say."""
        return _MAX_TOKENS

    def max_connections(self) -> int:
        """One sample at a time."""
        return 1

    def collapse_user_messages(self) -> bool:
        """Chat templates want roles to alternate."""
        return True

    def collapse_assistant_messages(self) -> bool:
        """Chat templates want roles to alternate."""
        return True


def _plain(message: ChatMessage) -> dict[str, str]:
    """A message as chat templates take it. Raises SteeringError for one that is more than text."""
    more = not isinstance(message.content, str) and any(part.type != "text" for part in message.content)
    if more or message.role not in ("system", "user", "assistant"):
        raise SteeringError("The provider elsteer takes text of system, user and assistant only: leave this task out.")
    return {"role": message.role, "content": message.text}
