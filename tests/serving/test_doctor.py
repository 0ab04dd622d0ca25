"""What `searoom doctor --engine` concludes from its measurements."""

import pytest
from rich.console import Console
from typer.testing import CliRunner

from serving import doctor
from serving.bench.engine.offline import EngineSetup
from serving.cli import app
from serving.doctor import Decode, native, rates, speed
from serving.engine.machine import Machine

MACHINE = Machine(flops_per_s=4e11, bytes_per_s=4e10)


@pytest.mark.parametrize(
    ("decode", "said", "advice"),
    [
        (Decode(1, 8.0, 6.0, 1.0, "memory"), "75% of the roofline", "smaller weights"),
        (Decode(64, 50.0, 40.0, 40.0, "compute"), "bound by compute", "wider cores"),
        (Decode(1, 30.0, 6.0, 1.0, "memory"), "20% of the roofline", "much is lost"),
    ],
)
def test_a_batchs_speed_is_told_beside_its_floor(decode, said, advice) -> None:
    """Its share of the roofline, the resource that binds, and what that resource suggests."""
    finding = speed(decode, MACHINE)
    assert said in finding.fact and advice in finding.advice


def test_rates_give_the_ridge_point() -> None:
    """400 GFLOP/s over 40 GB/s: ten FLOP a byte."""
    assert "ridge point 10.0 FLOP/byte" in rates(MACHINE, "bfloat16")[-1].fact


def test_why_the_compiled_path_cannot_run_decides_the_advice() -> None:
    """A compiler can be installed, an instruction cannot."""
    assert native(None).advice is None
    assert native("there is no C++ compiler (g++)").advice == "install g++"
    assert "newer CPU" in native("this CPU lacks avx512_bf16").advice


def test_the_command_without_the_engine_needs_no_model() -> None:
    """Facts about the machine, one a line, at once."""
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0 and "cores" in result.output and "memory:" in result.output


@pytest.mark.full
def test_the_embedded_model_is_examined() -> None:
    """Every section of the report is there, and the pool's figures are the worker's."""
    console = Console(record=True, width=200)
    doctor.run(EngineSetup(threads=1, kv_blocks=128, max_num_seqs=16), console)
    text = console.export_text()
    for title in ("machine", "native path", "KV pool", "measured", "decode"):
        assert f"\n{title}\n" in text
    assert "blocks, as kv_blocks says" in text and "batch 16:" in text
