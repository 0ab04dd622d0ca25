"""How many KV blocks a rank's pool gets, and why. Pure.

    activations = n · (4·d + (H + 2·Hkv)·hd + 3·f) · 4 bytes        of the widest step, one layer at a time;
                                                                    with experts, k·d more: their results
    logits      = 4 · S · V · 4 bytes                               drawn from by copies: sorted, summed
    usable      = free after loading - activations - logits - graphs - staging - 2 % of what is free
    blocks      = min(usable, limit) / bytes a block

with n tokens and S sequences at most in a step; d, H, Hkv, hd, f, V as in `step_time`.
"""

from __future__ import annotations

from dataclasses import dataclass

from serving.errors import ConfigError
from serving.model_spec import ModelSpec

SAFETY_SHARE = 0.02
"""Of free memory, left to the allocator and to what else the process needs."""

DEFAULT_CPU_KV_BYTES = 1 << 30
"""The pool's limit on a CPU, where other programs want memory too."""

_VALUE_BYTES = 4  # activations are computed in float32 at most
_LOGIT_COPIES = 4


def step_peak_bytes(spec: ModelSpec, max_step_tokens: int, max_num_seqs: int) -> tuple[int, int]:
    """What the largest step needs besides weights and KV: activations, logits."""
    heads = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    widths = 4 * spec.hidden_size + heads + 3 * spec.mlp_width
    if spec.experts is not None:
        widths += spec.experts.per_token * spec.hidden_size
    activations = max_step_tokens * widths * _VALUE_BYTES
    logits = _LOGIT_COPIES * min(max_num_seqs, max_step_tokens) * spec.vocab_size * _VALUE_BYTES
    return activations, logits


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """One rank's memory once its weights are loaded, and what it is asked to keep of it for KV."""

    free_bytes: int
    activation_bytes: int
    logits_bytes: int
    block_bytes: int
    graphs_bytes: int = 0  # on a GPU alone
    staging_bytes: int = 0  # for blocks on their way to host memory and back
    host_blocks: int = 0  # that are kept there
    kv_blocks: int | None = None  # so many, or an error
    limit_bytes: int | None = None  # else as many as fit, at most this

    @property
    def safety_bytes(self) -> int:
        return int(self.free_bytes * SAFETY_SHARE)

    @property
    def step_bytes(self) -> int:
        """What steps need besides weights and KV."""
        return self.activation_bytes + self.logits_bytes + self.graphs_bytes + self.staging_bytes

    @property
    def usable_bytes(self) -> int:
        return max(0, self.free_bytes - self.step_bytes - self.safety_bytes)

    @property
    def fitting_blocks(self) -> int:
        return self.usable_bytes // self.block_bytes


@dataclass(frozen=True)
class KvSizing:
    """A pool's size, with its reasons."""

    num_blocks: int
    memory: RankMemory
    fitting_blocks: int  # on the tightest rank

    def lines(self, block_tokens: int) -> list[str]:
        """The sizing told step by step, sums in MiB."""
        memory = self.memory
        tokens = self.num_blocks * block_tokens
        return [
            f"free once the weights are loaded          {_mib(memory.free_bytes):>10}",
            f"- activations of the widest step          {_mib(memory.activation_bytes):>10}",
            f"- logits and their copies                 {_mib(memory.logits_bytes):>10}",
            *self._graphs_lines(),
            *self._staging_lines(),
            f"- safety, {SAFETY_SHARE:.0%} of what is free            {_mib(memory.safety_bytes):>10}",
            f"= usable for KV                           {_mib(memory.usable_bytes):>10}",
            f"a block of {block_tokens} tokens                      {memory.block_bytes / 1024:>6.0f} KiB",
            f"blocks that fit the tightest rank         {self.fitting_blocks:>10}",
            f"{self._why():<42}{self.num_blocks:>10}",
            f"= context tokens at a time                {tokens:>10}",
            *self._host_lines(),
        ]

    def _graphs_lines(self) -> list[str]:
        needed = self.memory.graphs_bytes
        return [f"- CUDA graphs, captured when first needed {_mib(needed):>10}"] if needed else []

    def _staging_lines(self) -> list[str]:
        needed = self.memory.staging_bytes
        return [f"- blocks on their way to host memory      {_mib(needed):>10}"] if needed else []

    def _host_lines(self) -> list[str]:
        blocks = self.memory.host_blocks
        if not blocks:
            return []
        why = f"blocks more, in {_mib(blocks * self.memory.block_bytes)} of host memory"
        return [f"{why:<42}{blocks:>10}"]

    def _why(self) -> str:
        memory = self.memory
        if memory.kv_blocks is not None:
            return "blocks, as kv_blocks says"
        if memory.limit_bytes is not None and self.num_blocks < self.fitting_blocks:
            return f"blocks, within the limit of {_mib(memory.limit_bytes)}"
        return "blocks, all that fit"


def size_host_tier(limit_bytes: int | None, block_bytes: int, tightest_bytes: int) -> int:
    """Blocks that each rank keeps in host memory; `tightest_bytes` are free to the rank with the least.

    Raises ConfigError where the limit is more than that, or does not hold one block.
    """
    if limit_bytes is None:
        return 0
    if limit_bytes > tightest_bytes:
        raise ConfigError(
            f"host_kv_bytes: {_mib(limit_bytes)} of host memory are asked for, a rank can have "
            f"{_mib(tightest_bytes)}; lower it, or free memory"
        )
    if limit_bytes < block_bytes:
        raise ConfigError(
            f"host_kv_bytes: {limit_bytes} does not hold one KV block of {block_bytes} bytes; raise it"
        )
    return limit_bytes // block_bytes


def check_can_wake(free_bytes: int, weights_bytes: int, kv_bytes: int, step_bytes: int) -> None:
    """Raises ConfigError where a rank that gave its device's memory back does not get it again."""
    needed = weights_bytes + kv_bytes + step_bytes
    if needed > free_bytes:
        raise ConfigError(
            f"sleep_after_s: waking, this rank needs {_mib(needed)} on its device, {_mib(weights_bytes)} "
            f"for weights and {_mib(kv_bytes)} for KV among them, and {_mib(free_bytes)} are free: something "
            "else took them meanwhile. Leave sleep_after_s out where others use the device too"
        )


def check_can_sleep(weights_bytes: int, tightest_bytes: int) -> None:
    """Raises ConfigError where the host cannot hold a rank's weights; `tightest_bytes` are free to each."""
    if weights_bytes > tightest_bytes:
        raise ConfigError(
            f"sleep_after_s: asleep, a rank keeps {_mib(weights_bytes)} of weights in host memory, and can "
            f"have {_mib(tightest_bytes)}; leave it out, lower host_kv_bytes, or free memory"
        )


def size_pool(memory: RankMemory, tightest_blocks: int) -> KvSizing:
    """The pool's blocks, the same on every rank; `tightest_blocks` fit the rank with the least room.

    Raises ConfigError when the blocks asked for do not fit, and when not one does.
    """
    wanted, limit = memory.kv_blocks, memory.limit_bytes
    if wanted is None:
        wanted = tightest_blocks
        if limit is not None:
            wanted = min(wanted, limit // memory.block_bytes)
    if 0 < wanted <= tightest_blocks:
        return KvSizing(wanted, memory, tightest_blocks)
    if memory.kv_blocks is None and tightest_blocks > 0:
        raise ConfigError(
            f"kv_memory_bytes: {limit} does not hold one KV block of {memory.block_bytes} bytes; raise it"
        )
    kept = memory.step_bytes
    needed = (max(wanted, 1) * memory.block_bytes + kept) / (1 - SAFETY_SHARE)
    raise ConfigError(
        f"kv_blocks: {max(wanted, 1)} blocks of {memory.block_bytes} bytes need {needed / 2**20:.1f} MiB "
        f"free on every rank, {kept / 2**20:.1f} MiB of it for a step's activations and logits; this rank "
        f"has {memory.free_bytes / 2**20:.1f} MiB, and {tightest_blocks} blocks fit the tightest rank. Lower "
        "kv_blocks, max_step_tokens or max_num_seqs, free memory, or take a smaller model or dtype"
    )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f} MiB"
