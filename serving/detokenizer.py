"""Token ids to text while they are generated, cut at stop strings.

    ids ──token bytes──► bytes ──incremental UTF-8──► text ──StopCutter──► text for the client

Working in bytes makes it exact: a character split over tokens is held until it is whole, and how
ids are grouped into pushes never changes the text. Two kinds of vocabulary exist in Llama models:
byte-level (each character of a token stands for one byte, GPT-2's alphabet) and SentencePiece
(`▁` is a space, `<0xE2>` a byte).
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers

from serving.errors import ModelFileError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SENTENCEPIECE_STEPS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """How a vocabulary spells.

    `table[id]` is the bytes a token stands for, empty for control tokens; `strips_first_space`
    says that a text's first token carries a space that is not part of the text.
    """

    table: tuple[bytes, ...]
    strips_first_space: bool


def token_bytes(backend: tokenizers.Tokenizer, hidden: frozenset[int], where: str) -> TokenBytes:
    """The spelling table of `backend`; ids in `hidden` spell nothing.

    Raises ModelFileError, naming `where`, for a decoder that is neither byte-level nor SentencePiece.
    """
    description = json.loads(backend.to_str())["decoder"]
    steps = description["decoders"] if description and description["type"] == "Sequence" else [description]
    kinds = {step["type"] if step else "none" for step in steps}
    spell: Callable[[str], bytes]
    if kinds == {"ByteLevel"}:
        spell = _byte_level_speller()
    elif kinds <= _SENTENCEPIECE_STEPS:
        spell = _spell_sentencepiece
    else:
        raise ModelFileError(f"{where} has a decoder that is not supported: {', '.join(sorted(kinds))}")
    vocabulary = backend.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        if token_id not in hidden:
            table[token_id] = spell(token)
    return TokenBytes(tuple(table), any(_strips_first_space(step) for step in steps if step))


class StreamDecoder:
    """Text of one reply, released as soon as nothing to come can change it."""

    def __init__(
        self, spelling: TokenBytes, stop: Sequence[str] = (), *, continues_text: bool = False
    ) -> None:
        self._table = spelling.table
        self._strip_next = spelling.strips_first_space and not continues_text
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._cutter = StopCutter(stop) if stop else None

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met; no further push gives text."""
        return self._cutter is not None and self._cutter.stopped

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that became certain with `token_ids`; ids outside the vocabulary give none."""
        table = self._table
        raw = b"".join([table[token] for token in token_ids if 0 <= token < len(table)])
        if self._strip_next and raw:
            self._strip_next = False
            raw = raw.removeprefix(b" ")
        text = self._utf8.decode(raw)
        return text if self._cutter is None else self._cutter.push(text)

    def finish(self) -> str:
        """The text still held: an unfinished character as U+FFFD, and what looked like a stop string."""
        text = self._utf8.decode(b"", final=True)
        return text if self._cutter is None else self._cutter.push(text) + self._cutter.finish()


class StopCutter:
    """Ends a text before the stop string that is completed first; of two completed at once, the longer.

    Holds back text while it may be the beginning of a stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops` are non-empty strings."""
        assert all(stops), "an empty stop string stops everything"
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The part of all text so far that is certain and not yet returned."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        certain = len(text) - self._held_chars(text)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """What was held, now that the text is over."""
        held, self._held = self._held, ""
        return held

    def _held_chars(self, text: str) -> int:
        """Length of the longest end of `text` that begins some stop string."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-size:]
            if any(stop.startswith(end) for stop in self._stops):
                return size
        return 0


def _byte_level_speller() -> Callable[[str], bytes]:
    """GPT-2's alphabet: printable bytes stand for themselves, the other 68 for U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    byte_of = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if chr(byte) not in byte_of)
    byte_of |= {chr(0x100 + offset): byte for offset, byte in enumerate(others)}

    def spell(token: str) -> bytes:
        if all(char in byte_of for char in token):
            return bytes(byte_of[char] for char in token)
        return token.encode()  # an added token, written as it is

    return spell


def _spell_sentencepiece(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()


def _strips_first_space(step: dict[str, Any]) -> bool:
    if step["type"] == "Strip":
        return step["content"] == " " and step["start"] > 0
    return step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never"
