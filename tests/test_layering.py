"""The house plan as data: which room may import which, and where each library may stand.

A module not listed under `ROOMS` fails, so that a new room is placed on purpose.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("cluster", "serving", "kernels", "autoscaler")

# package → packages it may import besides itself
PACKAGE_IMPORTS = {
    "kernels": set(),
    "cluster": set(),
    "autoscaler": {"cluster"},
    "serving": {"cluster", "kernels"},
}

# inside serving, top to bottom: a layer imports itself and what is below, never what is above
COMPOSITION, DEPLOYMENT, PARTS, ENGINE, MODELS, FOUNDATION = range(6)
ROOMS = {
    COMPOSITION: {
        "__main__", "app", "cli", "chat", "deploy", "doctor", "status", "up", "running", "watch", "bench",
    },
    DEPLOYMENT: {"ingress", "router", "replica"},
    PARTS: {
        "completions", "dispatch_book", "dispatcher", "fleet", "gateway", "generation", "gpu_watch", "links",
        "load_reporter", "output_lengths", "prefix_index", "rates", "rank", "rank_group", "region_records",
        "request_log", "responses", "router_link", "routing", "simulator", "wait_queue",
    },
    ENGINE: {"engine"},
    MODELS: {"models"},
    FOUNDATION: {
        "auth", "background", "block_hash",
        "chat_template", "config", "detokenizer", "direct_calls", "embedded_model", "errors", "host",
        "gguf_files", "gguf_tokenizer", "http_server", "logs", "messages", "metrics", "model_files",
        "model_spec", "openai_api", "openai_fields", "openai_frames", "ray_compat", "safetensors_files",
        "tokenizer", "tracing", "transport",
    },
}  # fmt: skip
LAYER_OF = {room: layer for layer, rooms in ROOMS.items() for room in rooms}

# library → modules that may import it (a trailing "." means every module below)
LIBRARY_WALLS = {
    "ray": {
        "serving.ingress", "serving.router", "serving.replica", "serving.rank_group", "serving.app",
        "serving.cli", "serving.up", "serving.deploy", "serving.ray_compat", "serving.bench.",
        "cluster.local", "cluster.local_nodes",
    },
    "torch": {
        "serving.engine.worker", "serving.engine.model_runner", "serving.engine.sampler",
        "serving.engine.native_runner", "serving.engine.native_sampler",
        "serving.engine.cuda_device", "serving.engine.cuda_runner", "serving.engine.kv_transfer",
        "serving.engine.parked_weights", "serving.engine.rank_dtypes", "serving.engine.weight_source",
        "serving.models.", "kernels.", "serving.bench.engine.", "serving.bench.collectives.",
    },
    "starlette": {"serving.gateway", "serving.http_server", "serving.responses"},
    "uvicorn": {"serving.http_server"},
    "triton": {"kernels.gpu."},
    "fastapi": set(),
    "aiohttp": {"serving.bench.load.client"},
    "transformers": {
        "serving.gguf_tokenizer", "serving.bench.engine.peer_transformers",
        "serving.bench.engine.peer_transformers_batching",
    },
    "pickle": set(),
    "cloudpickle": set(),
    "autoscaler": {"serving.cli", "serving.status", "autoscaler."},
}  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}


def imports_of(path: Path) -> set[str]:
    """Absolute names this file imports; `from a import b` gives a and, if it is a module, a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
    return found


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("module", sorted(MODULES))
def test_packages_import_only_what_the_plan_allows(module):
    """kernels and cluster stand alone; serving and autoscaler never meet, but in the command line."""
    package = module.split(".")[0]
    allowed = PACKAGE_IMPORTS[package] | {package}
    if module in LIBRARY_WALLS["autoscaler"]:
        allowed = allowed | {"autoscaler"}
    used = {name.split(".")[0] for name in imports_of(MODULES[module])} & set(PACKAGES)
    assert used <= allowed


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.startswith("serving.")))
def test_serving_imports_downwards(module):
    """composition → deployments → their parts → engine → models → foundation; deployments keep apart."""
    layer = LAYER_OF[room_of(module)]
    for name in imports_of(MODULES[module]):
        if not name.startswith("serving."):
            continue
        other = LAYER_OF[room_of(name)]
        assert other >= layer, f"{module} imports {name}, which is above it"
        if layer == other == DEPLOYMENT:
            assert room_of(name) == room_of(module), f"{module} imports {name}: deployments keep apart"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_libraries_stay_behind_their_walls(module):
    """Ray, torch, HTTP and conversion libraries are imported only where the plan says."""
    for name in imports_of(MODULES[module]):
        walls = LIBRARY_WALLS.get(name.split(".")[0])
        if walls is not None:
            allowed = any(
                module == wall or (wall[-1] == "." and f"{module}.".startswith(wall)) for wall in walls
            )
            assert allowed, f"{module} must not import {name}"


def test_no_import_cycles():
    """Every module can be understood before those that use it."""
    graph = {module: imports_of(path) & MODULES.keys() for module, path in MODULES.items()}
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for other in graph[module] - {module}:
            visit(other)
        done.add(path.pop())

    for module in graph:
        visit(module)


def test_no_imports_inside_functions():
    """What a module needs is said at its top."""
    hidden = [
        f"{module}:{inner.lineno}"
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
        if isinstance(inner, ast.Import | ast.ImportFrom)
    ]
    assert hidden == []


def test_broad_excepts_stand_only_in_outermost_loops():
    """A broad `except` hides bugs, except where a process would otherwise die or a client get nothing."""
    outermost = {"serving.gateway", "serving.rank"}
    broad = {
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
    }
    assert broad <= outermost
