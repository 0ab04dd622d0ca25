"""`python -m kernels.bench.worker FAMILIES START [--tiny]`: cases in a process of their own, a line each.

A case that fails is a line, too. One that takes the CUDA context with it ends the process, and the caller
goes on behind it. A kernel's interpreter is chosen when Triton is imported, which is another reason for a
process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch

from kernels.bench import attention_cases, elementwise_cases, linear_cases, moe_cases, sampling_cases
from kernels.bench.case import Case, Place
from kernels.bench.measure import CASE_ERRORS, described, measure_case, measure_ceilings

CONTEXT_LOST = 3
"""The exit status where every case that was begun has its line, and the next needs another process."""
CEILINGS = "ceilings"
FAMILIES: dict[str, Callable[[Place], Iterator[Case]]] = {
    "paged_decode": attention_cases.decode_cases,
    "paged_prefill": attention_cases.prefill_cases,
    "rms_norm": elementwise_cases.rms_norm_cases,
    "rope_kv": elementwise_cases.rope_kv_cases,
    "swiglu": elementwise_cases.swiglu_cases,
    "sampling": sampling_cases.cases,
    "quantized_linear": linear_cases.cases,
    "moe": moe_cases.cases,
}


def main(families: list[str], start: int, place: Place) -> None:
    """Print the results of the families' cases from `start` on, or the machine's ceilings."""
    if families == [CEILINGS]:
        print(json.dumps(asdict(measure_ceilings())), flush=True)
        return
    named = ((family, case) for family in families for case in FAMILIES[family](place))
    for index, (family, case) in enumerate(named):
        if index >= start:
            print(json.dumps(_line(family, case, place)), flush=True)
            if not _is_alive(place):
                sys.exit(CONTEXT_LOST)


def _line(family: str, case: Case, place: Place) -> dict[str, object]:
    try:
        return asdict(measure_case(family, case, place))
    except CASE_ERRORS as error:
        return {"family": family, "shape": case.shape, "why": described(error)}


def _is_alive(place: Place) -> bool:
    """Whether the CUDA context still takes work: after an illegal access, say, it does not."""
    if place.device == "cpu":
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    tiny = sys.argv[3:] == ["--tiny"]
    main(sys.argv[1].split(","), int(sys.argv[2]), Place("cpu" if tiny else "cuda", tiny))
