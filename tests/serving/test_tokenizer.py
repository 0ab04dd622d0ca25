"""Tokens, prompts and streamed text, against the tokenizers library and transformers themselves."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models

from serving.chat_template import ChatTemplate
from serving.detokenizer import StopCutter, StreamDecoder, token_bytes
from serving.errors import InvalidRequest, ModelFileError
from serving.model_files import ModelFiles
from serving.tokenizer import Tokenizer

TRICKY = "Ünïcode 👩‍👩‍👧‍👦\n\n\tx =   12 日本語 <|im_end|> �  end "


@pytest.fixture(scope="module")
def tokenizer(embedded_model: ModelFiles) -> Tokenizer:
    return Tokenizer(embedded_model)


@pytest.fixture(scope="module")
def backend(embedded_model: ModelFiles) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(embedded_model.folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def sentencepiece() -> tokenizers.Tokenizer:
    """A small vocabulary of SentencePiece's kind, with the decoder Llama 2's tokenizer.json has."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁▁", "▁the", "▁a", "cat", "é", "▁日", "本", "s"]
    backend = tokenizers.Tokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, []))
    backend.add_special_tokens([AddedToken(piece, special=True) for piece in pieces[:3]])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


SPELLABLE = st.characters(max_codepoint=0x3FFFF, codec="utf-8", exclude_characters="\x04\x06\x13\x14\x16\x1d")


def split(items: Any, cuts: list[int]) -> list[Any]:
    """`items` in the consecutive pieces that `cuts` make of it."""
    bounds = [0, *sorted(cut % (len(items) + 1) for cut in cuts), len(items)]
    return [items[start:end] for start, end in pairwise(bounds)]


def streamed(decoder: StreamDecoder, pushes: list[list[int]]) -> str:
    return "".join([*map(decoder.push, pushes), decoder.finish()])


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 49_160), max_size=24), cuts=st.lists(st.integers(0, 99), max_size=8))
def test_byte_level_stream_is_the_full_decode(
    tokenizer: Tokenizer, backend: tokenizers.Tokenizer, ids: list[int], cuts: list[int]
) -> None:
    """Any ids at all, control tokens, broken characters and ids out of range included, in any pushes."""
    assert streamed(tokenizer.stream_decoder(), split(ids, cuts)) == backend.decode(ids)


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(SPELLABLE, max_size=30),
    cuts=st.lists(st.integers(0, 99), max_size=8),
)
def test_text_survives_the_round_trip(tokenizer: Tokenizer, text: str, cuts: list[int]) -> None:
    """Text to ids and streamed back is the text itself; no push shows half a character.

    SPELLABLE leaves out what SmolLM2's vocabulary has no bytes for: six control characters, and the
    planes past U+3FFFF.
    """
    pushes = split(tokenizer.encode(text, add_special=False), cuts)
    decoder = tokenizer.stream_decoder()
    said = ""
    for push in pushes:
        said += decoder.push(push)
        assert text.startswith(said)
    assert said + decoder.finish() == text


@settings(max_examples=150, deadline=None)
@given(
    ids=st.lists(st.integers(0, 2) | st.integers(259, 267), max_size=12),
    text=st.text(max_size=6),
    cuts=st.lists(st.integers(0, 99), max_size=8),
)
def test_sentencepiece_stream_is_the_full_decode(
    sentencepiece: tokenizers.Tokenizer, ids: list[int], text: str, cuts: list[int]
) -> None:
    """Spaces, the first one included, and characters spelt in byte tokens come out as in a full decode."""
    ids = ids + [3 + byte for byte in text.encode()] + ids[::-1]
    spelling = token_bytes(sentencepiece, frozenset({0, 1, 2}), "test")
    assert streamed(StreamDecoder(spelling), split(ids, cuts)) == sentencepiece.decode(ids)


def test_a_continued_text_keeps_its_first_space(sentencepiece: tokenizers.Tokenizer) -> None:
    """What follows a completion's prompt begins with the space between them."""
    spelling = token_bytes(sentencepiece, frozenset(), "test")
    the = sentencepiece.get_vocab()["▁the"]
    assert StreamDecoder(spelling).push([the, the]) == "the the"
    assert StreamDecoder(spelling, continues_text=True).push([the, the]) == " the the"


def test_unfinished_characters_wait(tokenizer: Tokenizer) -> None:
    """A character spread over tokens shows only when whole, or as U+FFFD when the reply ends before."""
    ids = tokenizer.encode("👩", add_special=False)
    assert len(ids) > 1
    decoder = tokenizer.stream_decoder()
    assert [decoder.push([token]) for token in ids] == [""] * (len(ids) - 1) + ["👩"]
    decoder = tokenizer.stream_decoder()
    assert (decoder.push(ids[:-1]), decoder.finish()) == ("", "�")


def naive_cut(text: str, stops: list[str]) -> str:
    """Grow the text a character at a time; end it before the first stop string that completes."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


few_letters = st.text(alphabet="ab\n", max_size=25)


@settings(max_examples=300, deadline=None)
@given(
    text=few_letters,
    stops=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 99), max_size=10),
)
def test_stop_strings_cut_where_the_naive_cut_does(text: str, stops: list[str], cuts: list[int]) -> None:
    """However the text arrives, it ends where the first completed stop string begins."""
    cutter = StopCutter(stops)
    said = "".join([cutter.push(piece) for piece in split(text, cuts)])
    assert text.startswith(said)
    assert said + cutter.finish() == naive_cut(text, stops)
    assert cutter.stopped == any(stop in text for stop in stops)


def test_only_a_possible_stop_is_held_back() -> None:
    """Text that cannot begin a stop string goes out at once."""
    cutter = StopCutter(["</end>"])
    assert [cutter.push(piece) for piece in ("a < b", " <", "/e", "h", "</end", ">no")] == [
        "a < b", " ", "", "</eh", "", ""
    ]  # fmt: skip
    assert cutter.stopped
    assert cutter.push("more") == "" and cutter.finish() == ""


def test_stream_decoder_stops(tokenizer: Tokenizer) -> None:
    """A stop string that spans tokens ends the text, and nothing follows."""
    ids = tokenizer.encode("one two three four", add_special=False)
    decoder = tokenizer.stream_decoder(stop=["o thr"])
    assert "".join(decoder.push([token]) for token in ids) + decoder.finish() == "one tw"
    assert decoder.stopped


CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TRICKY}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": " b\n"},
        {"role": "user", "content": "<b>{{ 7 * 7 }}</b>"},
    ],
    [{"role": "assistant", "content": ""}],
]


@pytest.fixture(scope="module")
def reference(embedded_model: ModelFiles) -> Any:
    return transformers.AutoTokenizer.from_pretrained(embedded_model.folder, local_files_only=True)


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("generate", [True, False])
def test_prompts_are_what_transformers_makes(
    tokenizer: Tokenizer, reference: Any, messages: list[dict[str, Any]], generate: bool
) -> None:
    """Rendered text and its ids equal apply_chat_template's, the default system prompt included."""
    text = tokenizer.render_chat(messages, add_generation_prompt=generate)
    assert text == reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    ids = reference.apply_chat_template(messages, add_generation_prompt=generate, return_dict=False)
    assert tokenizer.encode(text, add_special=False) == ids
    assert ("helpful AI assistant named SmolLM" in text) == (messages[0]["role"] != "system")


def with_template(embedded_model: ModelFiles, folder: Path, template: str | None, **config: Any) -> Tokenizer:
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(embedded_model.folder / name, folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(replace(embedded_model, folder=folder))


TEMPLATE = """
{%- set told = namespace(system=false) -%}
{{ bos_token }}{% for message in messages %}
    {% if message.role == 'system' %}
        {%- set told.system = true %}
        {% continue %}
    {% endif %}
    {% generation %}[{{ message | tojson }}]{% endgeneration %}
{% endfor %}
{{ strftime_now('%Y')[:1] }}{{ told.system }}{{ eos_token }}
"""


def test_other_templates_render_as_in_transformers(reference: Any) -> None:
    """Whitespace control, loop controls, tojson without HTML escapes, strftime_now, generation blocks."""
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    template = ChatTemplate(TEMPLATE, special, "test")
    for messages in CONVERSATIONS:
        expected = reference.apply_chat_template(messages, chat_template=TEMPLATE, tokenize=False)
        assert template.render(messages, add_generation_prompt=False) == expected


def test_named_templates(embedded_model: ModelFiles, tmp_path: Path) -> None:
    """Of several templates the one named default is used; a special token may be an object."""
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D{{ bos_token }}"}]
    tokenizer = with_template(
        embedded_model, tmp_path, None, chat_template=named, bos_token={"content": "<s>", "special": True}
    )
    assert tokenizer.render_chat([]) == "D<s>"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.nothing.more }}",
        "{{ 'a' + 1 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% for a in range(2000) %}{% for b in range(900) %}{{ 'xxxxxxxxxxxx' }}{% endfor %}{% endfor %}",
    ],
)
def test_what_a_template_refuses_is_the_clients_error(template: str) -> None:
    """A template that raises, fails, reaches out of its sandbox or grows without end gives a 400."""
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(template, {}, "test").render([{"role": "user", "content": "x"}])
    assert caught.value.param == "messages"


def test_a_model_without_template_points_to_completions(embedded_model: ModelFiles, tmp_path: Path) -> None:
    """A base model says which endpoint serves it."""
    with pytest.raises(InvalidRequest, match="/v1/completions"):
        with_template(embedded_model, tmp_path, None).render_chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", "{% if %}"),
        ("tokenizer.json", '{"version": '),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_broken_files_are_named(embedded_model: ModelFiles, tmp_path: Path, name: str, content: str) -> None:
    """A tokenizer or template that cannot be read is reported with its path."""
    with_template(embedded_model, tmp_path, "x")
    (tmp_path / name).write_text(content)
    with pytest.raises(ModelFileError, match=name):
        Tokenizer(replace(embedded_model, folder=tmp_path))


def test_ids_of_the_model(tokenizer: Tokenizer) -> None:
    """SmolLM2 ends replies with <|im_end|>, has 17 control tokens and splits numbers into digits."""
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, (2,), 49_152)
    assert tokenizer.special_ids == frozenset(range(17))
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>b", add_special=False)) == "ab"
    # its pre-tokenizer isolates each digit, so the two spaces stay one token
    assert len(tokenizer.encode("x  12", add_special=False)) == 4


def test_prompts_in_ids(tokenizer: Tokenizer) -> None:
    """A completion's prompt may be ids of this vocabulary, and nothing else."""
    assert tokenizer.encode_prompt([5, 49_151]) == [5, 49_151]
    assert tokenizer.encode_prompt("hi") == tokenizer.encode("hi", add_special=True)
    for wrong in ([-1], [49_152]):
        with pytest.raises(InvalidRequest, match="49151"):
            tokenizer.encode_prompt(wrong)
