"""`python -m kernels.bench.worker FAMILIES START [--tiny]`: cases in a process of their own, a line each.

What breaks one case, a CUDA context included, then breaks nothing else: the caller goes on behind it. A
kernel's interpreter is chosen when Triton is imported, which is another reason for a process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict

from kernels.bench import attention_cases, elementwise_cases, linear_cases, moe_cases, sampling_cases
from kernels.bench.case import Case, Place
from kernels.bench.measure import measure_case, measure_ceilings

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
            print(json.dumps(asdict(measure_case(family, case, place))), flush=True)


if __name__ == "__main__":
    tiny = sys.argv[3:] == ["--tiny"]
    main(sys.argv[1].split(","), int(sys.argv[2]), Place("cpu" if tiny else "cuda", tiny))
