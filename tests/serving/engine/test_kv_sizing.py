"""The pool's size is arithmetic on measured memory; what it says of itself adds up."""

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.kv_sizing import RankMemory, size_pool, step_peak_bytes
from serving.errors import ConfigError
from tests.serving.engine.test_step_time import SMOLLM2

MIB = 1 << 20
MEMORY = RankMemory(
    free_bytes=1000 * MIB, activation_bytes=50 * MIB, logits_bytes=30 * MIB, block_bytes=MIB
)  # fmt: skip


def test_the_largest_steps_needs_are_counted() -> None:
    """SmolLM2, 512 tokens and 64 sequences: 7,872 values a token; four float32 copies of its logits."""
    activations, logits = step_peak_bytes(SMOLLM2, 512, 64)
    assert activations == 512 * (4 * 576 + 15 * 64 + 3 * 1536) * 4
    assert logits == 4 * 64 * 49152 * 4
    assert step_peak_bytes(SMOLLM2, 16, 64)[1] == logits / 4  # a step draws no more than its tokens


def test_without_a_wish_the_pool_takes_what_is_left() -> None:
    """1,000 MiB less 80 for a step and 20 for safety are 900 blocks; a limit and other ranks lower it."""
    assert size_pool(MEMORY, MEMORY.fitting_blocks).num_blocks == 900
    assert size_pool(MEMORY, 700).num_blocks == 700
    assert size_pool(replace(MEMORY, limit_bytes=100 * MIB + 1), 900).num_blocks == 100
    assert size_pool(replace(MEMORY, limit_bytes=5000 * MIB), 900).num_blocks == 900


def test_graphs_take_their_part() -> None:
    """What is kept for CUDA graphs is not given to the pool, and has its line; without, there is none."""
    sizing = size_pool(replace(MEMORY, graphs_bytes=300 * MIB), 600)
    assert sizing.memory.fitting_blocks == 600
    assert sum("graphs" in line and "300 MiB" in line for line in sizing.lines(16)) == 1
    assert not any("graphs" in line for line in size_pool(MEMORY, 900).lines(16))


def test_blocks_asked_for_are_given_or_refused_whole() -> None:
    """An explicit number is never shrunk: who asked for it planned with it."""
    assert size_pool(replace(MEMORY, kv_blocks=900), 900).num_blocks == 900
    for wish in (0, 901):
        with pytest.raises(ConfigError, match="kv_blocks"):
            size_pool(replace(MEMORY, kv_blocks=wish), 900)
    with pytest.raises(ConfigError, match=r"kv_memory_bytes: 100 .*raise it"):
        size_pool(replace(MEMORY, limit_bytes=100), 900)


def test_no_room_says_what_would_do() -> None:
    """Free memory below a step's own needs holds no block: the error names how much would."""
    tight = replace(MEMORY, free_bytes=60 * MIB)
    assert tight.fitting_blocks == 0
    with pytest.raises(ConfigError, match=r"need 82\.7 MiB free .* has 60\.0 MiB"):
        size_pool(tight, 0)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 2**34), st.integers(0, 2**34), st.integers(1, 2**26))
def test_what_is_taken_leaves_what_a_step_needs(free, activations, logits, block_bytes) -> None:
    """Pool, activations, logits and safety together never exceed what is free; one more block would."""
    memory = RankMemory(
        free_bytes=free, activation_bytes=activations, logits_bytes=logits, block_bytes=block_bytes
    )
    if memory.fitting_blocks == 0:
        return
    taken = size_pool(memory, memory.fitting_blocks).num_blocks * block_bytes
    kept = activations + logits + memory.safety_bytes
    assert taken + kept <= free < taken + block_bytes + kept


def test_the_explanation_adds_up() -> None:
    """The lines' own figures: free less what is kept is what is usable, and tokens are blocks of 16."""
    lines = size_pool(replace(MEMORY, limit_bytes=256 * MIB), 900).lines(16)
    figures = [int(number) for line in lines for number in re.findall(r"(\d+)(?: MiB)?$", line)]
    free, activations, logits, safety, usable, fitting, blocks, tokens = figures
    assert free - activations - logits - safety == usable == fitting
    assert (blocks, tokens) == (256, 4096)
    assert "within the limit of 256 MiB" in lines[-2]
