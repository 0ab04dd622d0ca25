"""Public traces as workloads: Mooncake's (FAST'25), with prefixes, and Azure's (2023), without.

Mooncake: a JSON object a line: `timestamp` (ms), `input_length`, `output_length` (tokens) and
`hash_ids`, one a block of 512 tokens, the last block perhaps not full. An id names its block and all
before it. An engine's blocks are smaller, so each id is divided into `512 / block_tokens` of them.
Azure: a CSV with the columns TIMESTAMP, ContextTokens, GeneratedTokens.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from serving.bench.router.workload import Window, Workload, chain_hash, hash_chain, in_order
from serving.errors import ConfigError
from serving.simulator import SimRequest

MOONCAKE_BLOCK_TOKENS = 512
MOONCAKE_TICK_S = 3.0
"""Its timestamps lie about so far apart (1,180 different ones in 3,537 s): what was in between is lost."""

MAX_NEW_TOKENS = 2048
"""No trace says what limit its clients set. They get this, so that it gives no length away."""

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
REGION = "local"
TENANT = "trace"
WHOLE = Window()

T = TypeVar("T")


class MooncakeLine(msgspec.Struct, frozen=True):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def read_trace(
    path: Path, block_tokens: int, seed: int = 0, raw_times: bool = False, window: Window = WHOLE
) -> Workload:
    """The workload in a `.jsonl` (Mooncake) or `.csv` (Azure) file.

    Raises ConfigError naming the file, the line and the field that is wrong.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give a Mooncake .jsonl or an Azure .csv trace")
    if path.suffix == ".jsonl":
        return read_mooncake(path, block_tokens, seed, raw_times, window)
    if path.suffix == ".csv":
        return read_azure(path, block_tokens, window)
    raise ConfigError(f"{path}: traces are Mooncake's .jsonl or Azure's .csv, not {path.suffix or 'this'}")


def read_mooncake(
    path: Path, block_tokens: int, seed: int = 0, raw_times: bool = False, window: Window = WHOLE
) -> Workload:
    """Mooncake's requests; without `raw_times` spread evenly over the tick they were rounded to."""
    if MOONCAKE_BLOCK_TOKENS % block_tokens:
        raise ConfigError(
            f"{path}: its blocks of {MOONCAKE_BLOCK_TOKENS} tokens are no multiple of {block_tokens}: "
            "give --block-tokens a power of 2 up to 512"
        )
    lines = window.cut(_required(path, list(_mooncake_lines(path))))
    jitter_s = np.zeros(len(lines))
    if not raw_times:
        jitter_s = np.random.default_rng(seed).uniform(0.0, MOONCAKE_TICK_S, len(lines))
    chains, sessions = _BlockNames(block_tokens), _Sessions()
    requests = [
        SimRequest(
            number=number,
            arrival_s=line.timestamp / 1e3 + float(jitter_s[number]),
            region=REGION,
            tenant=TENANT,
            priority=0,
            prompt_tokens=line.input_length,
            output_tokens=line.output_length,
            max_tokens=max(MAX_NEW_TOKENS, line.output_length),
            block_hashes=chains.of(line),
            session=sessions.of(line.hash_ids),
        )
        for number, line in enumerate(lines)
    ]
    times = "raw timestamps" if raw_times else f"timestamps spread over their {MOONCAKE_TICK_S:.0f} s ticks"
    return Workload(name=path.stem, requests=in_order(requests), notes=(times,))


def read_azure(path: Path, block_tokens: int, window: Window = WHOLE) -> Workload:
    """Azure's requests. The trace knows no prefixes, so no two prompts share a block."""
    requests = []
    rows = window.cut(_required(path, list(_azure_rows(path))))
    for number, (at_s, prompt_tokens, output_tokens) in enumerate(rows):
        names = hash_chain(b"", f"azure {number}".encode())
        requests.append(
            SimRequest(
                number=number,
                arrival_s=at_s,
                region=REGION,
                tenant=TENANT,
                priority=0,
                prompt_tokens=prompt_tokens,
                output_tokens=output_tokens,
                max_tokens=max(MAX_NEW_TOKENS, output_tokens),
                block_hashes=tuple(next(names) for _ in range(prompt_tokens // block_tokens)),
            )
        )
    return Workload(name=path.stem, requests=in_order(requests), notes=("no prefixes in this trace",))


class _BlockNames:
    """Engine blocks' hashes of 512-token ids, each made once."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._per_id = MOONCAKE_BLOCK_TOKENS // block_tokens
        self._known: dict[tuple[bytes, int], list[bytes]] = {}

    def of(self, line: MooncakeLine) -> tuple[bytes, ...]:
        """Of every full engine block of the prompt; the last id's block may be cut short."""
        names: list[bytes] = []
        parent = b""
        for trace_id in line.hash_ids:
            part = self._known.get((parent, trace_id))
            if part is None:
                part = self._known[parent, trace_id] = self._divided(parent, trace_id)
            names += part
            parent = part[-1]
        return tuple(names[: line.input_length // self._block_tokens])

    def _divided(self, parent: bytes, trace_id: int) -> list[bytes]:
        part = []
        for index in range(self._per_id):
            parent = chain_hash(parent, b"%d/%d" % (trace_id, index))
            part.append(parent)
        return part


class _Sessions:
    """Links a request to the one before it whose blocks it continues, beyond the first, which all share."""

    def __init__(self) -> None:
        self._owner: dict[int, int] = {}
        self._count = 0

    def of(self, hash_ids: list[int]) -> int:
        beyond = hash_ids[1:]
        session = next((self._owner[i] for i in reversed(beyond) if i in self._owner), None)
        if session is None:
            session = self._count
            self._count += 1
        for trace_id in beyond:
            self._owner.setdefault(trace_id, session)
        return session


def _mooncake_lines(path: Path) -> Iterator[MooncakeLine]:
    decoder = msgspec.json.Decoder(MooncakeLine)
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                line = decoder.decode(text)
            except msgspec.DecodeError as broken:
                raise ConfigError(f"{path}, line {number}: {broken}") from broken
            _check_mooncake(path, number, line)
            yield line


def _check_mooncake(path: Path, number: int, line: MooncakeLine) -> None:
    for field in ("input_length", "output_length"):
        if getattr(line, field) < 1:
            raise ConfigError(f"{path}, line {number}: {field} is {getattr(line, field)}, below 1")
    if line.timestamp < 0:
        raise ConfigError(f"{path}, line {number}: timestamp is {line.timestamp}, below 0")
    needed = -(-line.input_length // MOONCAKE_BLOCK_TOKENS)
    if len(line.hash_ids) < needed:
        raise ConfigError(
            f"{path}, line {number}: hash_ids has {len(line.hash_ids)} ids, "
            f"and {line.input_length} tokens are {needed} blocks of {MOONCAKE_BLOCK_TOKENS}"
        )


def _azure_rows(path: Path) -> Iterator[tuple[float, int, int]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.reader(file)
        header = tuple(next(rows, ()))
        if header != AZURE_COLUMNS:
            raise ConfigError(f"{path}, line 1: the columns must be {','.join(AZURE_COLUMNS)}")
        for row in rows:
            if not row:
                continue
            where = f"{path}, line {rows.line_num}"
            if len(row) != len(AZURE_COLUMNS):
                raise ConfigError(f"{where}: {len(row)} fields, not {len(AZURE_COLUMNS)}")
            at_s = _timestamp_s(where, row[0])
            yield at_s, _count(where, AZURE_COLUMNS[1], row[1]), _count(where, AZURE_COLUMNS[2], row[2])


def _timestamp_s(where: str, text: str) -> float:
    """Seconds of a UTC time such as 2023-11-16 18:15:46.6805900; its last digits are below 1 µs."""
    try:
        return datetime.fromisoformat(text[:26]).replace(tzinfo=UTC).timestamp()
    except ValueError as broken:
        raise ConfigError(f"{where}: TIMESTAMP is {text!r}, which is no time") from broken


def _count(where: str, field: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{where}: {field} is {text!r}, not a number of at least 1")
    return int(text)


def _required(path: Path, found: list[T]) -> list[T]:
    if not found:
        raise ConfigError(f"{path}: holds no request")
    return found
