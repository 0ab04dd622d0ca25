"""Text to token ids and messages to prompts, with the model's own tokenizer.json and chat template.

The way back, ids to text as they are generated, is serving/detokenizer.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from serving.chat_template import ChatTemplate
from serving.detokenizer import StreamDecoder, TokenBytes, token_bytes
from serving.errors import InvalidRequest, ModelFileError
from serving.model_files import ModelFiles
from serving.model_spec import read_model_spec

_SPECIAL_TOKEN_KEYS = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """One model's tokenizer and chat template. Immutable, and safe to use from several threads.

    `special_ids` are the control tokens, which never show in text; `eos_ids` those that end a reply.
    """

    def __init__(self, files: ModelFiles) -> None:
        """Raises ModelFileError when tokenizer.json or a template is missing, broken or unsupported."""
        path = files.folder / "tokenizer.json"
        try:
            self._backend = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ModelFileError(f"{path} cannot be read ({error}): fetch the model again") from error
        self._backend.no_truncation()
        self._backend.no_padding()
        spec = read_model_spec(files.folder)
        added = self._backend.get_added_tokens_decoder()
        self.vocab_size: int = spec.vocab_size
        self.bos_id: int | None = spec.bos_token_id
        self.eos_ids: tuple[int, ...] = spec.eos_token_ids
        self.special_ids: frozenset[int] = frozenset(id for id, token in added.items() if token.special)
        self._token_bytes: TokenBytes = token_bytes(self._backend, self.special_ids, str(path))
        self._template = _read_template(files.folder)

    def encode(self, text: str, add_special: bool) -> list[int]:
        """Token ids of `text`. `add_special` adds what the model expects around a text (a BOS).

        Do not add it to a rendered chat: the template writes its own.
        """
        # Without offsets, which nobody asks for, a third faster; only the batch call can leave them out.
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special)[0].ids

    def encode_prompt(self, prompt: str | Sequence[int]) -> list[int]:
        """Ids of a completion's prompt, which may be ids already; InvalidRequest for one out of range."""
        if isinstance(prompt, str):
            return self.encode(prompt, add_special=True)
        if any(not 0 <= token < self.vocab_size for token in prompt):
            raise InvalidRequest(f"token ids go from 0 to {self.vocab_size - 1}", param="prompt")
        return list(prompt)

    def render_chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt text of a conversation. Raises InvalidRequest when the template refuses it."""
        if self._template is None:
            raise InvalidRequest(
                "this model has no chat template: use /v1/completions with a prompt", param="messages"
            )
        return self._template.render(messages, add_generation_prompt=add_generation_prompt)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The whole text of `token_ids`, control tokens left out."""
        decoder = self.stream_decoder()
        return decoder.push(token_ids) + decoder.finish()

    def stream_decoder(self, stop: Sequence[str] = (), *, continues_text: bool = False) -> StreamDecoder:
        """A decoder for one reply.

        `continues_text` keeps a first space, as for a completion, which goes on from its prompt.
        """
        return StreamDecoder(self._token_bytes, stop, continues_text=continues_text)


def _read_template(folder: Path) -> ChatTemplate | None:
    config_path = folder / "tokenizer_config.json"
    config = _read_object(config_path) if config_path.is_file() else {}
    special_tokens = {key: _content(config[key]) for key in _SPECIAL_TOKEN_KEYS if config.get(key)}
    template_path = folder / "chat_template.jinja"
    if template_path.is_file():
        return ChatTemplate(template_path.read_text(), special_tokens, str(template_path))
    source = config.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
    return ChatTemplate(source, special_tokens, str(config_path)) if source else None


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token.get("content", ""))


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ModelFileError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelFileError(f"{path} must hold a JSON object")
    return content
