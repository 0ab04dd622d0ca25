"""What requests are accepted, what is refused by name, and what they ask of the engine."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import ApiError, ContextLengthExceeded, InvalidRequest, UnsupportedField
from serving.openai_api import (
    ChatRequest,
    CompletionRequest,
    parse_chat,
    parse_completion,
    to_sampling,
)
from serving.openai_fields import CHAT_FIELDS, COMPLETION_FIELDS

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "m", "prompt": "hi"}
EOS = (2, 7)


def chat(**fields: Any) -> ChatRequest:
    return parse_chat(json.dumps(CHAT | fields).encode())


def completion(**fields: Any) -> CompletionRequest:
    return parse_completion(json.dumps(COMPLETION | fields).encode())


def refusal(parse: Any, **fields: Any) -> ApiError:
    with pytest.raises(InvalidRequest) as caught:
        parse(**fields)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0, "top_p": 1, "seed": -5, "max_tokens": 3, "stop": "END"},
        {"temperature": None, "stop": [], "stop_token_ids": [], "max_completion_tokens": 9},
        {"top_k": -1, "min_p": 0.1, "ignore_eos": True, "stop": ["a", "b", "c", "d"]},
        {"max_tokens": 5, "max_completion_tokens": 5},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"user": "u", "metadata": {"a": "b"}, "safety_identifier": "s", "prompt_cache_key": "k"},
        {"n": 1, "logprobs": False, "top_logprobs": 0, "logit_bias": {}, "frequency_penalty": 0.0},
        {
            "tools": [],
            "tool_choice": "none",
            "parallel_tool_calls": True,
            "response_format": {"type": "text"},
        },
        {"store": False, "service_tier": "auto", "functions": None, "modalities": ["text"]},
    ],
)
def test_accepted(fields: dict[str, Any]) -> None:
    """Honoured fields, labels, and fields at a value that asks for nothing are accepted."""
    assert chat(**fields).model == "m"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"presence_penalty": -1}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"store": True}, "store"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"temprature": 0.5}, "temprature"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}
                ]
            },
            "messages.0.content.1.type",
        ),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages.0.tool_calls"),
        ({"messages": [{"role": "user", "content": "x", "colour": "red"}]}, "messages.0.colour"),
    ],
)
def test_refused_by_name(fields: dict[str, Any], param: str) -> None:
    """A field that would alter the reply and is not honoured is refused, and the error names it."""
    error = refusal(chat, **fields)
    assert isinstance(error, UnsupportedField)
    assert error.code == "unsupported_parameter"
    assert error.param == param
    assert error.message.startswith(param.removesuffix(".type"))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ["a", 1]}, "stop"),
        ({"stop": "x" * 1000}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": 5}, "stream_options"),
        ({"model": None}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages.0"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content"),
        ({"user": 5}, "user"),
        ({"metadata": "x"}, "metadata"),
    ],
)
def test_invalid_values_are_located(fields: dict[str, Any], param: str) -> None:
    """A value out of range or of another type is a 400 whose param is the dotted path to it."""
    error = refusal(chat, **fields)
    assert (error.param, error.code) == (param, None)


def test_an_error_does_not_repeat_what_the_client_sent() -> None:
    """A validation error names the place, not the content: prompts do not end up in logs."""
    error = refusal(chat, messages=[{"role": "user", "content": ["SECRET"]}], temperature="SECRET")
    assert "SECRET" not in json.dumps(error.body())


@pytest.mark.parametrize(
    "body", [b"", b"{", b"null", b"[1]", b'{"temperature": NaN}', b'{"a": 1e999}', b"\xff", b"[" * 9999]
)
def test_unparsable_bodies(body: bytes) -> None:
    """A body that is not a JSON object, NaN and infinity included, is a 400 of both kinds of request."""
    for parse in (parse_chat, parse_completion):
        with pytest.raises(InvalidRequest):
            parse(body)


@pytest.mark.parametrize(
    ("prompt", "one"),
    [("hi", "hi"), ([1, 2], [1, 2]), (["hi"], "hi"), ([[1, 2]], [1, 2]), ([5], [5]), ([], [])],
)
def test_one_prompt(prompt: Any, one: Any) -> None:
    """A prompt is a string, token ids, or a list with exactly one of those."""
    assert completion(prompt=prompt).one_prompt == one


@pytest.mark.parametrize("prompt", [["a", "b"], [[1], [2]], [-1], [True], {"a": 1}, None, [1.5], ["a", 1]])
def test_other_prompts_are_refused(prompt: Any) -> None:
    """Several prompts, or what is no prompt, are refused and the error names `prompt`."""
    assert refusal(completion, prompt=prompt).param == "prompt"


@pytest.mark.parametrize(
    ("field", "value"), [("logprobs", 0), ("echo", True), ("best_of", 2), ("suffix", "x"), ("n", 3)]
)
def test_completion_refusals(field: str, value: Any) -> None:
    """Fields only completions have are refused by name too."""
    assert refusal(completion, **{field: value}).param == field


def test_every_field_may_be_null() -> None:
    """OpenAI's clients may send null for any optional field; it means the default."""
    assert chat(**dict.fromkeys(CHAT_FIELDS), stop=None, seed=None, max_tokens=None).wanted_tokens is None
    assert completion(**dict.fromkeys(COMPLETION_FIELDS)).one_prompt == "hi"


def test_messages_for_the_template() -> None:
    """Parts are joined, `developer` is `system`, a name is passed on, a replayed reply's empty fields go."""
    request = chat(
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "user", "content": "c", "name": "Ann"},
            {"role": "assistant", "content": "d", "refusal": None, "annotations": [], "tool_calls": None},
        ]
    )
    assert request.template_messages() == [
        {"role": "system", "content": "a\nb"},
        {"role": "user", "content": "c", "name": "Ann"},
        {"role": "assistant", "content": "d"},
    ]


def test_sampling_defaults() -> None:
    """A chat may use the rest of the context, a completion 16 tokens or what is left; seeds are drawn."""
    params = to_sampling(chat(), 10, 100, EOS, lambda: 99)
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (90, 1.0, 1.0, 0)
    assert (params.seed, params.stop_token_ids) == (99, EOS)
    assert to_sampling(completion(), 10, 100, EOS, lambda: 0).max_tokens == 16
    assert to_sampling(completion(), 95, 100, EOS, lambda: 0).max_tokens == 5


def test_sampling_takes_what_was_asked() -> None:
    """Each field reaches the engine; a negative seed folds into uint64, top_k -1 is off."""
    request = chat(temperature=0, top_p=0.5, top_k=-1, min_p=0.2, seed=-1, max_tokens=7, ignore_eos=True)
    params = to_sampling(request, 10, 100, EOS, lambda: 0)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0, 0.5, 0, 0.2)
    assert (params.seed, params.max_tokens, params.stop_token_ids) == (2**64 - 1, 7, ())


def test_context_length() -> None:
    """What fits exactly is served; one token more is refused with both figures in the message."""
    assert to_sampling(chat(max_tokens=90), 10, 100, EOS, lambda: 0).max_tokens == 90
    with pytest.raises(ContextLengthExceeded, match=r"100 tokens.*101 tokens \(10 in the messages, 91"):
        to_sampling(chat(max_completion_tokens=91), 10, 100, EOS, lambda: 0)
    with pytest.raises(ContextLengthExceeded, match="resulted in 100 tokens") as caught:
        to_sampling(completion(), 100, 100, EOS, lambda: 0)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(InvalidRequest, match="empty"):
        to_sampling(completion(prompt=""), 0, 100, EOS, lambda: 0)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
field_names = st.sampled_from(
    sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, *CHAT_FIELDS, *COMPLETION_FIELDS})
)
messages = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "name", "type", "text"]), json_values, max_size=4)
)


@settings(max_examples=150, deadline=None)
@given(
    fields=st.dictionaries(field_names | st.text(max_size=8), json_values, max_size=5),
    talk=messages | json_values,
)
def test_any_json_gives_a_request_or_an_api_error(fields: dict[str, Any], talk: Any) -> None:
    """No JSON object makes parsing raise anything but an ApiError."""
    for parse, start in ((parse_chat, CHAT), (parse_completion, COMPLETION)):
        for body in (start | fields, fields, start | {"messages": talk, "prompt": talk}):
            try:
                parse(json.dumps(body).encode())
            except ApiError as error:
                assert error.status == 400
                assert set(error.body()["error"]) == {"message", "type", "param", "code"}


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_give_a_request_or_an_api_error(body: bytes) -> None:
    """No bytes make parsing raise anything but an ApiError."""
    for parse in (parse_chat, parse_completion):
        with pytest.raises(ApiError):
            parse(body)
