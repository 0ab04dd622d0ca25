"""Log lines: JSON, one a line, and nothing in them that was not meant to be."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from serving import logs

PROMPT = "the secret recipe of my grandmother"
KEY = "sk-canary-5f2e91"


@pytest.fixture(autouse=True)
def _loggers_as_they_were() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in logs.PACKAGES]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def _lines(stream: io.StringIO) -> list[dict]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_one_json_object_with_static_and_own_fields() -> None:
    """`extra` joins the static fields by name; a newline in a message does not end the line."""
    stream = io.StringIO()
    logs.configure("info", stream=stream, region="eu", replica="r1")
    logging.getLogger("serving.router").info("picked\n%s", "twice", extra={"request_id": "a1", "blocks": 7})
    (line,) = _lines(stream)
    when = line.pop("time")
    assert when.endswith("Z") and len(when) == len("2026-01-01T00:00:00.000Z")
    assert line == {
        "level": "info",
        "logger": "serving.router",
        "message": "picked\ntwice",
        "region": "eu",
        "replica": "r1",
        "request_id": "a1",
        "blocks": 7,
    }


def test_neither_an_exceptions_text_nor_an_unlisted_field_is_written() -> None:
    """A prompt and a key, in an exception, its cause and in extras, stay inside; type and place do not."""
    stream = io.StringIO()
    logs.configure("debug", stream=stream)
    try:
        try:
            raise KeyError(KEY)
        except KeyError as cause:
            raise ValueError(f"bad prompt: {PROMPT}") from cause
    except ValueError:
        logging.getLogger("serving.gateway").exception(
            "request failed", extra={"request_id": "a1", "prompt": PROMPT, "authorization": KEY}
        )
    written = stream.getvalue()
    assert PROMPT not in written and KEY not in written
    (line,) = _lines(stream)
    assert line["error"] == "ValueError" and line["request_id"] == "a1"
    assert "test_logs.py" in line["raised_at"][-1]


def test_a_static_field_must_be_on_the_list() -> None:
    """What every line would carry is checked once, at the start."""
    with pytest.raises(AssertionError, match="api_key"):
        logs.configure("info", api_key=KEY)


def test_configuring_again_replaces_and_leaves_other_loggers_alone() -> None:
    """No line twice, none below the level, and none of Ray's or a library's."""
    first, second = io.StringIO(), io.StringIO()
    root_handlers = list(logging.getLogger().handlers)
    logs.configure("info", stream=first)
    logs.configure("warning", stream=second, region="us")
    logging.getLogger("serving.router").info("below the level")
    logging.getLogger("cluster.local").warning("told")
    assert first.getvalue() == ""
    assert [line["message"] for line in _lines(second)] == ["told"]
    assert logging.getLogger().handlers == root_handlers
