"""OpenAI's request fields that Searoom does not act on yet, and what is said about each.

No field is dropped in silence. A field is honoured, or it is at a value that asks for nothing, or
the request is refused with the field's name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from serving.errors import UnsupportedField

_OFF: tuple[Any, ...] = (False,)
_EMPTY: tuple[Any, ...] = ([], {})
_ZERO: tuple[Any, ...] = (0, 0.0)
_ONE: tuple[Any, ...] = (1, 1.0)

# field -> the values besides null that ask for nothing
_SHARED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": _ZERO,
    "presence_penalty": _ZERO,
    "logit_bias": _EMPTY,
    # extensions other servers know
    "repetition_penalty": _ONE,
    "length_penalty": _ONE,
    "min_tokens": _ZERO,
    "stop_token_ids": _EMPTY,
    "bad_words": _EMPTY,
    "allowed_token_ids": (),
    "use_beam_search": _OFF,
    "include_stop_str_in_output": _OFF,
    "skip_special_tokens": (True,),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "return_token_ids": _OFF,
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "cache_salt": (),
    "priority": _ZERO,
}
CHAT_FIELDS: dict[str, tuple[Any, ...]] = _SHARED | {
    "logprobs": _OFF,
    "top_logprobs": _ZERO,
    "response_format": ({"type": "text"},),
    "tools": _EMPTY,
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": _EMPTY,
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "moderation": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "service_tier": ("auto", "default"),
    "store": _OFF,
    "web_search_options": (),
    "prompt_cache_retention": (),
    "prompt_cache_options": (),
    "chat_template": (),
    "chat_template_kwargs": _EMPTY,
    "documents": _EMPTY,
    "add_generation_prompt": (True,),
    "continue_final_message": _OFF,
}
COMPLETION_FIELDS: dict[str, tuple[Any, ...]] = _SHARED | {
    "logprobs": (),
    "echo": _OFF,
    "best_of": (1,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
}
STREAM_OPTION_FIELDS: dict[str, tuple[Any, ...]] = {
    "include_obfuscation": _OFF,
    "continuous_usage_stats": _OFF,
}
# What clients send back of a reply they were given, when it asks for nothing.
MESSAGE_FIELDS: dict[str, tuple[Any, ...]] = {
    "refusal": (),
    "annotations": _EMPTY,
    "audio": (),
    "tool_calls": _EMPTY,
    "function_call": (),
    "reasoning_content": ("",),
    "reasoning": ("",),
}


def without_unsupported(
    fields: Mapping[str, Any],
    honoured: Collection[str],
    known: Mapping[str, tuple[Any, ...]],
    path: str = "",
) -> dict[str, Any]:
    """The `honoured` ones of `fields`.

    Raises UnsupportedField, its `param` the dotted path, for one that is `known` but asks for
    something, and for one nobody knows. `path` is a prefix, such as "stream_options.".
    """
    for name, value in fields.items():
        if name in honoured or (name in known and _asks_for_nothing(value, known[name])):
            continue
        param = f"{path}{name}"[:100]
        if name in known:
            raise UnsupportedField(f"{param} is not supported yet: remove it", param=param)
        raise UnsupportedField(f"{param} is not a known field: remove it", param=param)
    return {name: value for name, value in fields.items() if name in honoured}


def _asks_for_nothing(value: Any, idle: tuple[Any, ...]) -> bool:
    # types are compared too: in Python True == 1 and 0 == 0.0
    return value is None or any(type(value) is type(same) and value == same for same in idle)
