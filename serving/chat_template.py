"""A model's chat template: the Jinja program, from its own files, that turns messages into a prompt.

Templates are never taken from a request. They run in Jinja's immutable sandbox, with the settings
and the few functions transformers gives them, so that the same template renders the same text.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from serving.errors import InvalidRequest, ModelFileError

MAX_PROMPT_CHARS = 16 * 1024 * 1024

# What a template can raise on messages it was not written for; anything else is a bug of ours.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class ChatTemplate:
    """One compiled template with the special tokens it may name."""

    def __init__(self, source: str, special_tokens: dict[str, str], where: str) -> None:
        """`special_tokens` are `bos_token`, `eos_token` and the like; `where` names the file in errors."""
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ModelFileError(f"{where} is not a valid chat template: {error}") from error
        self._special_tokens = special_tokens

    def render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The prompt of `messages`, ending where the assistant's reply begins.

        Raises InvalidRequest when the template refuses the messages (many demand alternating
        roles) or the prompt passes MAX_PROMPT_CHARS.
        """
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            ):
                size += len(piece)
                if size > MAX_PROMPT_CHARS:
                    raise InvalidRequest(
                        f"the prompt is longer than {MAX_PROMPT_CHARS} characters", param="messages"
                    )
                pieces.append(piece)
        except _TEMPLATE_ERRORS as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error
        return "".join(pieces)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant wrote, for training; serving renders its body."""

    tags = {"generation"}  # noqa: RUF012 (the name and type Jinja asks for)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    functions: dict[str, Callable[..., Any]] = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    environment.globals.update(functions)
    return environment


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)
