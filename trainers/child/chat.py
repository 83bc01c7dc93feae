"""A row's conversation in the form that a chat template takes. Pure: needs a tokenizer only for its chat template."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from trainers.child.failure import TrainFailure, is_template_error

CHATML = (
    "{% if tools %}{{ '<|im_start|>system\\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\\n\\n' }}{% endif %}"
    "{{ '# Tools\\n\\nYou may call functions. Their signatures:\\n<tools>' }}"
    "{% for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}"
    "{{ '\\n</tools>\\n\\nFor each call, return a JSON object within <tool_call></tool_call> tags:\\n<tool_call>\\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n\' }}{% endif %}'
    "{% for message in messages %}{% if not (tools and loop.first and message['role'] == 'system') %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') }}"
    "{% for call in message['tool_calls'] or [] %}{% set function = call['function'] or call %}"
    "{{ '\\n' if message['content'] or not loop.first }}"
    "{{ '<tool_call>\\n{\"name\": \"' + function['name'] + '\", \"arguments\": ' }}"
    "{{ function['arguments'] if function['arguments'] is string else function['arguments'] | tojson }}"
    "{{ '}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>' }}"
    "{% if message['role'] == 'assistant' and eos_token and eos_token != '<|im_end|>' %}{{ eos_token }}{% endif %}"
    "{{ '\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""For a base model without a chat template; tools as Hermes and Qwen write them. The end-of-text token after an assistant turn
lets generation stop where the tokenizer does not know <|im_end|>."""

Turn = dict[str, Any]

_MARK = "\U000f0000"
"""For private use: in no template, and in hardly anybody's text."""


@dataclass(frozen=True)
class Chat:
    """`turns` without their weights."""

    turns: list[Turn]
    tools: Sequence[Any] | None
    tokenizer: Any

    @classmethod
    def of(cls, row: Mapping[str, Any], tokenizer: Any) -> Chat:
        """Raises TrainFailure where the template does not show the calls of tools."""
        turns = [{key: value for key, value in turn.items() if key != "weight"} for turn in row["messages"]]
        if not any(turn.get("tool_calls") for turn in turns):
            return cls(turns, row.get("tools"), tokenizer)
        if not all(_is_call(call) for turn in turns for call in turn.get("tool_calls") or ()):
            raise _refused("a call of a tool has no function with a name")
        for form in (_with_objects, _with_text):
            chat = cls([form(turn) for turn in turns], row.get("tools"), tokenizer)
            try:
                if chat._shows_calls():
                    return chat
            except Exception as error:
                wants_text = isinstance(error, TypeError) or is_template_error(error)  # it joins arguments to text
                if form is _with_text or not wants_text:
                    raise
        raise _refused("the template does not show all calls of tools, so they could not be learned")

    @cached_property
    def whole(self) -> str:
        return self.show(self.turns)

    def show(self, turns: Sequence[Turn], *, ask: bool = False) -> str:
        """`ask`: with the beginning of an assistant's turn at the end."""
        text: str = self.tokenizer.apply_chat_template(
            list(turns), tools=self.tools, tokenize=False, add_generation_prompt=ask
        )
        return text

    def _shows_calls(self) -> bool:
        marked = [with_calls(turn, lambda one: {**one, "name": _MARK + one["name"]}) for turn in self.turns]
        calls = sum(len(turn.get("tool_calls") or ()) for turn in self.turns)
        return self.show(marked).count(_MARK) >= calls


def _is_call(call: Any) -> bool:
    function = call.get("function", call) if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _refused(reason: str) -> TrainFailure:
    hint = "Use a base model whose chat template knows tools, or leave tool_calls out of the rows."
    return TrainFailure("row_not_renderable", f"The chat template refuses a row: {reason}.", hint=hint)


def with_calls(turn: Turn, changed: Callable[[dict[str, Any]], dict[str, Any]]) -> Turn:
    """With the function of each call {"name", "arguments"} changed. It lies under `function`, or is the call itself."""
    if not turn.get("tool_calls"):
        return turn
    return {
        **turn,
        "tool_calls": [
            {**call, "function": changed(call["function"])} if "function" in call else changed(call)
            for call in turn["tool_calls"]
        ],
    }


def _with_objects(turn: Turn) -> Turn:
    """As transformers documents it: templates write the arguments as JSON, and a text would become JSON within JSON."""
    return with_calls(turn, lambda one: {**one, "arguments": _parsed(one.get("arguments"))})


def _with_text(turn: Turn) -> Turn:
    """As OpenAI has it, and as DeepSeek's templates want it."""
    return with_calls(turn, lambda one: {**one, "arguments": _written(one.get("arguments"))})


def _parsed(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return {} if arguments is None else arguments
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


def _written(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
