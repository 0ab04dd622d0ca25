from hypothesis import given, settings
from hypothesis import strategies as st

from serving.block_hash import hash_blocks
from serving.engine.sequence import Sequence
from tests.serving.engine.harness import ROOT, request


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 99), min_size=1, max_size=20),
    st.lists(st.integers(0, 99), max_size=20),
    st.integers(1, 5),
)
def test_hashes_of_a_growing_sequence_are_those_of_its_whole(prompt, outputs, block_tokens):
    """Outputs join the chain that Ingress would compute if they came back as a prompt."""
    sequence = Sequence.from_submit(request("a", tuple(prompt)), block_tokens)
    for token_id in outputs:
        sequence.expect(-1)
        sequence.learn(token_id)
    whole = hash_blocks(ROOT, prompt + outputs, block_tokens)
    assert tuple(sequence.block_hashes) == whole
    left_to_compute = len(prompt + outputs) - len(sequence.matchable_hashes()) * block_tokens
    assert 1 <= left_to_compute <= block_tokens, "the last token's logits are always wanted"


def test_times_count_from_acceptance():
    """Queue time ends with the first admission, prefill time with the first token."""
    sequence = Sequence.from_submit(request("a", (1, 2, 3)), 4)
    sequence.accepted_s, sequence.admitted_s, sequence.cached_tokens = 10.0, 10.25, 2
    times = sequence.times(10.75)
    assert (times.queue_ms, times.prefill_ms, times.cached_tokens) == (250.0, 500.0, 2)
