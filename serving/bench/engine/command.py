"""`python -m serving.bench engine`: the engine beside its peers, on one machine and in one run."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer
from rich.console import Console

from serving.bench.commands import check_folder, errors_told, plotter
from serving.bench.engine import prefix, pressure, quality, session, step_accuracy, tpot
from serving.bench.engine.figures import Load
from serving.bench.engine.offline import EngineSetup
from serving.bench.engine.peers import SCRIPTS, PeerSpec
from serving.bench.engine.report import write_json
from serving.bench.engine.tables import print_report
from serving.bench.engine.workload_command import WorkloadCommand
from serving.bench.engine.workloads import KINDS
from serving.errors import ConfigError


def engine(
    model: Annotated[str, typer.Option(help='"embedded", a folder, a .gguf file or a hub id.')] = "embedded",
    dtype: Annotated[str, typer.Option(help="Ours, as in the config; several are several rows.")] = "auto",
    batch: Annotated[str, typer.Option(help="Numbers of equal sequences at once.")] = "1,8,16,32,64",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Prompt length of those.")] = 40,
    new_tokens: Annotated[int, typer.Option(min=2, help="New tokens of each; the end is ignored.")] = 64,
    prefill: Annotated[
        int, typer.Option(min=0, help="Prompt length of a prefill alone: one sequence, one token. 0: none.")
    ] = 1024,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Ours and the peers'. Default: all cores.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each load, of which the median counts.")] = 5,
    peer: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(SCRIPTS)}; each with its --peer-python.")
    ] = None,
    peer_python: Annotated[
        list[str] | None,
        typer.Option(help="The interpreter of that peer's environment; tests/benchmarks/peers.sh makes it."),
    ] = None,
    pressure_share: Annotated[
        float | None,
        typer.Option(
            "--pressure", min=0.05, help="Instead: in so large a part of the KV blocks a load needs."
        ),
    ] = None,
    tpot_ms: Annotated[
        float | None,
        typer.Option(min=1, help="Instead: the governor under this target, beside the best fixed cap."),
    ] = None,
    with_step_time: Annotated[
        bool,
        typer.Option("--step-time", help="Instead: predicted against measured steps, beside repeat noise."),
    ] = False,
    with_quality: Annotated[
        bool, typer.Option("--quality", help="Instead: how far each --dtype is from float32, on 200 prompts.")
    ] = False,
    with_prefix: Annotated[
        bool,
        typer.Option("--prefix", help="Instead: time to first token of cached prompts beside cold ones."),
    ] = False,
    kv_dtype: Annotated[
        Literal["auto", "float8_e4m3"], typer.Option(help="Of the KV cache, as in the config.")
    ] = "auto",
    device: Annotated[
        Literal["cpu", "cuda"], typer.Option(help="Ours; with cuda, under the workloads below.")
    ] = "cpu",
    model_config: Annotated[
        str | None,
        typer.Option(
            help="Instead: this config (llama-3-8b, qwen3-0.6b, ... or its path), beside its floors."
        ),
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="The config's weights, drawn on the device.")
    ] = False,
    workload: Annotated[list[str] | None, typer.Option(help=f"{', '.join(KINDS)}. Default: all.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Of the workload `batch`.")] = 256,
    startup_folder: Annotated[
        Path | None,
        typer.Option(
            "--startup", file_okay=False, help="Instead: to the first token; weights are saved here once."
        ),
    ] = None,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Workloads in tiny: that they run, not how fast.")
    ] = False,
    host_kv_mib: Annotated[
        int | None, typer.Option(min=1, help="With --prefix: also of prompts evicted to so much host memory.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Write every figure there.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write a PNG there; needs Searoom's extra `bench`.")
    ] = None,
) -> None:
    """The engine alone, without Ray or HTTP: tokens/s, TTFT, TPOT, and what of the machine it uses.

    With peers, all are loaded at once and take turns, on the same weights and prompts.
    """
    console = Console()
    host_kv_bytes = None if host_kv_mib is None else host_kv_mib << 20
    setup = EngineSetup(source=model, threads=threads, kv_dtype=kv_dtype, host_kv_bytes=host_kv_bytes)
    dtypes = tuple(part.strip() for part in dtype.split(","))
    with errors_told():
        write_plot = None if plot is None else plotter("serving.bench.engine.plot")
        check_folder("--json", json_file)
        check_folder("--plot", plot)
        if device == "cuda" or model_config is not None or startup_folder is not None:
            command = WorkloadCommand(
                setup=replace(setup, dtype=dtypes[0], device=device),
                config=model_config,
                random_weights=random_weights,
                workloads=tuple(workload or KINDS),
                requests=requests,
                startup_folder=startup_folder,
                rehearse=rehearse,
                repeats=repeats,
                peers=tuple(peer or ()),
                peer_pythons=tuple(peer_python or ()),
                json_file=json_file,
            )
            if not command.run(console):
                raise typer.Exit(1)
            return
        results: dict[str, Any] = {}
        if pressure_share is not None:
            results["pressure"] = [
                pressure.run(replace(setup, dtype=name), pressure_share, console) for name in dtypes
            ]
        if tpot_ms is not None:
            results["tpot"] = [tpot.run(replace(setup, dtype=name), tpot_ms, console) for name in dtypes]
        if with_step_time:
            results["step_time"] = [step_accuracy.run(replace(setup, dtype=name), console) for name in dtypes]
        with console.status("") as status:
            if with_quality:
                setups = [replace(setup, dtype=name) for name in dtypes]
                results["quality"] = quality.run(setups, console, on_progress=status.update)
            if with_prefix:
                results["prefix"] = [
                    result
                    for name in dtypes
                    for result in prefix.run(replace(setup, dtype=name), console, repeats, status.update)
                ]
        if results:
            if json_file is not None:
                json_file.write_bytes(msgspec.json.format(msgspec.json.encode(results)) + b"\n")
            return
        loads = [Load("decode", size, prompt_tokens, new_tokens) for size in _sizes(batch)]
        loads += [Load("prefill", 1, prefill, 1)] if prefill else []
        report = session.run(
            session.Plan(
                setup=setup,
                dtypes=dtypes,
                peers=_peers(peer or [], peer_python or []),
                loads=tuple(loads),
                repeats=repeats,
                command=f"python -m serving.bench {shlex.join(sys.argv[1:])}",
            ),
            console,
        )
    print_report(report, console)
    if json_file is not None:
        write_json(report, json_file)
    if plot is not None and write_plot is not None:
        write_plot(report, plot)
    if report.failures:
        raise typer.Exit(1)


def _sizes(batch: str) -> list[int]:
    parts = batch.split(",")
    if not all(part.strip().isdigit() and int(part) for part in parts):
        raise ConfigError(f"--batch {batch}: give numbers above 0 with commas between, like 1,8,64")
    return [int(part) for part in parts]


def _peers(names: list[str], pythons: list[str]) -> tuple[PeerSpec, ...]:
    if len(names) != len(pythons):
        raise ConfigError(
            f"--peer: {len(names)} given, but {len(pythons)} times --peer-python: give each its interpreter"
        )
    if len(set(names)) != len(names):
        raise ConfigError(f"--peer: {', '.join(names)} names one twice")
    return tuple(PeerSpec.named(name, python) for name, python in zip(names, pythons, strict=True))
