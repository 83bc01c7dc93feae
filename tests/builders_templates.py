"""Chat templates shaped like those of well-known models, without what no test asks of them."""

from __future__ import annotations

from typing import Any

from builders_llama import CHAT_TEMPLATE, make_tokenizer

_CALLS = (
    "{%- for call in message.tool_calls %}{%- if (loop.first and content) or not loop.first %}{{ '\\n' }}{%- endif %}"
    "{%- if call.function %}{%- set call = call.function %}{%- endif %}"
    '{{- \'<tool_call>\\n{"name": "\' + call.name + \'", "arguments": \' }}{{- call.arguments | tojson }}'
    "{{- '}\\n</tool_call>' }}{%- endfor %}"
)
_TOOLS = (
    "{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' }}{%- for tool in tools %}{{- tool | tojson + '\\n' }}"
    "{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}"
)
_TURN = "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"

QWEN25 = (
    _TOOLS + "{%- for message in messages %}{%- set content = message.content %}"
    "{%- if message.role == 'assistant' and message.tool_calls %}{{- '<|im_start|>assistant' }}"
    "{%- if content %}{{- '\\n' + content }}{%- endif %}{%- for call in message.tool_calls %}"
    '{{- \'\\n<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}"
    "{%- elif message.role == 'tool' %}"
    "{{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}"
    "{%- else %}" + _TURN + "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

# thoughts of turns before the last question are cut off, an empty one stands before the last answer
QWEN3 = (
    _TOOLS + "{%- set ns = namespace(asking=true, last=messages|length - 1) %}{%- for message in messages[::-1] %}"
    "{%- set index = messages|length - 1 - loop.index0 %}"
    "{%- if ns.asking and message.role == 'user' and not (message.content.startswith('<tool_response>')"
    " and message.content.endswith('</tool_response>')) %}"
    "{%- set ns.asking = false %}{%- set ns.last = index %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- set content = message.content %}{%- if message.role == 'assistant' %}"
    "{%- set thought = '' %}{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}" + _CALLS + "{{- '<|im_end|>\\n' }}"
    "{%- elif message.role == 'tool' %}"
    "{{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}"
    "{%- else %}" + _TURN + "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

# no thought is ever shown, and the question for an answer ends with one that has begun; arguments are text
R1 = (
    "{%- set ns = namespace(system='', tool=false) %}{%- for message in messages %}{%- if message.role == 'system' %}"
    "{%- set ns.system = message.content %}{%- endif %}{%- endfor %}{{- bos_token + ns.system }}"
    "{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.tool = false %}"
    "{{- '<｜User｜>' + message.content }}{%- endif %}"
    "{%- if message.role == 'assistant' and message.tool_calls %}{%- set ns.tool = false %}"
    "{{- '<｜Assistant｜><｜tool▁calls▁begin｜>' }}{%- for call in message.tool_calls %}"
    "{{- call.type + '<｜tool▁sep｜>' + call.function.name + '\\n' + call.function.arguments }}{%- endfor %}"
    "{{- '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}{%- endif %}"
    "{%- if message.role == 'assistant' and message.content is not none %}"
    "{%- if ns.tool %}{{- '<｜tool▁outputs▁end｜>' + message.content + '<｜end▁of▁sentence｜>' }}{%- set ns.tool = false %}"
    "{%- else %}{%- set content = message.content %}"
    "{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1] %}{%- endif %}"
    "{{- '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{%- endif %}{%- endif %}"
    "{%- if message.role == 'tool' %}{%- set ns.tool = true %}{{- '<｜tool▁output▁begin｜>' + message.content }}{%- endif %}"
    "{%- endfor %}{%- if ns.tool %}{{- '<｜tool▁outputs▁end｜>' }}{%- endif %}"
    "{%- if add_generation_prompt and not ns.tool %}{{- '<｜Assistant｜><think>\\n' }}{%- endif %}"
)

LLAMA3 = (
    "{{- bos_token }}{%- if tools %}{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}"
    "{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{{- '<|eot_id|>' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.tool_calls %}"
    "{%- if message.tool_calls|length != 1 %}{{- raise_exception('only single tool-calls at once') }}{%- endif %}"
    "{%- set call = message.tool_calls[0].function %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{{- '{\"name\": \"' + call.name + '\", \"parameters\": ' }}{{- call.arguments | tojson }}{{- '}<|eot_id|>' }}"
    "{%- elif message.role == 'tool' %}"
    "{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}{{- message.content | tojson }}{{- '<|eot_id|>' }}"
    "{%- else %}"
    "{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)

# roles must take turns, the system's words stand before the first question's; no tools
GEMMA = (
    "{{- bos_token }}{%- if messages[0].role == 'system' %}{%- set system = messages[0].content + '\\n\\n' %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}{%- for message in messages %}"
    "{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('Conversation roles must alternate user/assistant') }}{%- endif %}"
    "{%- set role = 'model' if message.role == 'assistant' else message.role %}"
    "{{- '<start_of_turn>' + role + '\\n' + (system if loop.first else '') + message.content | trim }}"
    "{{- '<end_of_turn>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"
)

# the system's words stand before the last question; nothing asks for an answer but the question's end
MISTRAL = (
    "{%- set ns = namespace(system='') %}{%- if messages[0].role == 'system' %}"
    "{%- set ns.system = messages[0].content + '\\n\\n' %}{%- set messages = messages[1:] %}{%- endif %}"
    "{{- bos_token }}{%- for message in messages %}{%- if message.role == 'user' %}"
    "{{- '[INST] ' + (ns.system if loop.last or loop.index == messages|length - 1 else '') + message.content + '[/INST]' }}"
    "{%- else %}{{- ' ' + message.content | trim + eos_token }}{%- endif %}{%- endfor %}"
)

# the last answer ends otherwise than those before it; the channel belongs to what the model writes
GPT_OSS = (
    "{%- for message in messages %}{%- if message.role == 'assistant' %}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + message.content }}"
    "{{- '<|return|>' if loop.last else '<|end|>' }}{%- else %}"
    "{{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"
)

SPECIAL = (
    "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>",
)  # fmt: skip
TEMPLATES = {
    "chatml": CHAT_TEMPLATE, "qwen2.5": QWEN25, "qwen3": QWEN3, "r1": R1, "llama3": LLAMA3, "gemma": GEMMA,
    "mistral": MISTRAL, "gpt-oss": GPT_OSS,
}  # fmt: skip
ENDS = {
    "r1": "<｜end▁of▁sentence｜>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "gpt-oss": "<|end|>",
}  # fmt: skip
"""With which token a turn ends; the others: <|im_end|>."""


def tokenizer_of(template: str) -> Any:
    from tokenizers import AddedToken

    tokenizer = make_tokenizer(TEMPLATES.get(template, template))
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer
