"""Ahead-of-time compilation: everything that ships, for every architecture, without a GPU.

The compiler cannot share a process with Triton's interpreter, which the other tests here run in.
"""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels.gpu
from kernels.gpu.compile import ARCHITECTURES, families, occupancy, tasks

AMPERE, HOPPER, BLACKWELL = ARCHITECTURES
KERNELS = {id(variant.kernel) for name in families() for variant in importlib.import_module(name).variants()}
ROOM = Path(kernels.gpu.__file__).parent


def compiled(tmp_path, *options):
    """(the report of `--compile`, exit code, what it printed)."""
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "kernels.bench", "--compile", "--json", str(report), *options]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert report.exists(), done.stderr
    return json.loads(report.read_text())["compiled"], done


def check(results, done):
    assert [one for one in results if one["failures"]] == [] and done.returncode == 0, done.stdout
    assert {one["family"] for one in results} == {name.rpartition(".")[2] for name in families()}
    assert all(one["registers"] > 0 and 0 < one["occupancy"] <= 1 for one in results)


def test_every_kernel_compiles_for_hopper(tmp_path):
    """In one variant: no spills, no more shared memory than there is, tensor cores where they are meant."""
    results, done = compiled(tmp_path, "--capability", "90", "--one-each")
    check(results, done)
    assert len(results) == len(KERNELS)


@pytest.mark.full
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_what_ships_compiles(tmp_path, capability):
    """Every variant, for Ampere, Hopper and Blackwell."""
    results, done = compiled(tmp_path, "--capability", str(capability))
    check(results, done)
    assert len(results) == len(tasks(capabilities=[capability]))


BROKEN = """
import json

import triton
import triton.language as tl

from kernels.gpu.compile import ARCHITECTURES, compile_variant
from kernels.gpu.variants import Variant


@triton.jit
def product(x, y, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    total = tl.zeros((N, N), tl.float32)
    for step in range(16):
        total = tl.dot(tl.load(x + at), tl.load(y + at), total)
        x += N * N
    tl.store(y + at, total.to(tl.bfloat16))


@triton.jit
def sound(x):
    tl.store(x, 1.0)


@triton.jit
def slip(x):
    tl.store(x, y)


def variants():
    pair = {"x": "*bf16", "y": "*bf16"}
    yield Variant("spills", product, pair, {"N": 128}, 1, 1, (), ("x", "y"))
    yield Variant("shared memory", product, pair, {"N": 128}, 8, 8, (), ("x", "y"))
    yield Variant("no mma", sound, {"x": "*fp32"}, {}, 1, 1, ("mma",))
    yield Variant("does not compile", slip, {"x": "*fp32"}, {}, 1, 1)
    yield Variant("not in both", sound, {"z": "*fp32"}, {}, 1, 1)
    yield Variant("", sound, {"x": "*fp32"}, {}, 1, 1)
    yield Variant("", product, pair, {"N": 64}, 4, 3, ("mma", "cp.async"), ("x", "y"))


found = {}
for index, variant in enumerate(variants()):
    found[index] = variant.name, compile_variant("broken", variant, ARCHITECTURES[1]).failures
print(json.dumps(found))
"""


def test_what_is_wrong_with_a_kernel_is_said(tmp_path):
    """Spills, too much shared memory, missing tensor cores and what does not compile fail; the sound pass."""
    (tmp_path / "broken.py").write_text(BROKEN)  # a file, because Triton reads a kernel's source
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOM.parent.parent)
    command = [sys.executable, str(tmp_path / "broken.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    for expected, failures in json.loads(done.stdout).values():
        assert expected in " ".join(failures) if expected else failures == []


def test_occupancy_is_that_of_the_scarcest():
    """Of an SM's 64 warps: by registers, by shared memory, by blocks."""
    assert occupancy(HOPPER, registers=32, shared_bytes=0, warps=4) == 1
    assert occupancy(HOPPER, registers=128, shared_bytes=0, warps=4) == 0.25  # 65536 / (128 * 128) = 4
    assert occupancy(HOPPER, registers=168, shared_bytes=0, warps=8) == 0.125
    assert occupancy(HOPPER, registers=32, shared_bytes=100 << 10, warps=4) == 0.125  # 2 fit into 228 KiB
    assert occupancy(AMPERE, registers=32, shared_bytes=100 << 10, warps=4) == 0.0625
    assert occupancy(HOPPER, registers=16, shared_bytes=0, warps=1) == 0.5  # at most 32 blocks
    assert occupancy(BLACKWELL, registers=32, shared_bytes=228 << 10, warps=4) == 0


def test_every_kernel_ships_through_a_table():
    """A module that launches a kernel has `variants`, or nothing would compile it."""
    for path in ROOM.glob("*.py"):
        tree = ast.parse(path.read_text())
        launches = any(
            isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) for node in ast.walk(tree)
        )
        has_variants = any(
            isinstance(node, ast.FunctionDef) and node.name == "variants" for node in tree.body
        )
        assert has_variants or not launches, path.name


def test_a_family_that_is_not_there_is_an_error():
    """Named with those that are."""
    with pytest.raises(ValueError, match=r"no such family: mo; there are .*moe"):
        tasks(["mo"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_the_tests_are_interpreted():
    """Else they would have tested nothing."""
    assert os.environ["TRITON_INTERPRET"] == "1"
