"""Searoom's one configuration: the `args` of a Serve YAML and what `searoom up` builds are this model.

Frozen, checked once at the edge; unknown keys fail. It carries no secrets: a key's hash, or the
path of a key file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cluster.load import StepCoefficients
from cluster.regions import ClusterMap
from serving.errors import ConfigError

Count = Annotated[int, Field(ge=1)]
Milliseconds = Annotated[float, Field(ge=0)]
DEFAULT_REGION = "local"


class _Frozen(BaseModel):
    # A key given where a hash belongs must not come back in the error.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class ModelConfig(_Frozen):
    """Which model. `source` is "embedded", a folder, a .gguf file or a hub id."""

    source: str = "embedded"
    name: str | None = None  # the id clients use; default: the model's own
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8", "int4", "float8"] = "auto"


class MockEngineConfig(_Frozen):
    """An engine without a model: `serving.engine.mock_executor`. A step takes so many milliseconds:

    base + per_token · tokens + per_kv_token · context tokens + per_logit · tokens drawn + per_pair · pairs.
    """

    base_ms: Milliseconds = 20.0
    per_token_ms: Milliseconds = 0.1
    per_kv_token_ms: Milliseconds = 0.0001
    per_logit_ms: Milliseconds = 0.0
    per_pair_ms: Milliseconds = 0.0
    token_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()  # emitted in turn; default: common word pieces
    mean_output_tokens: Annotated[float, Field(ge=1)] | None = None  # default: replies end by max_tokens only

    @property
    def step(self) -> StepCoefficients:
        return StepCoefficients(
            self.base_ms, self.per_token_ms, self.per_kv_token_ms, self.per_logit_ms, self.per_pair_ms
        )


class EngineConfig(_Frozen):
    """One replica's engine. Memory is counted in blocks of `block_tokens` tokens."""

    device: Literal["cpu", "cuda"] = "cpu"
    tensor_parallel: Count = 1
    ranks_per_node: Count | None = None  # default: as many as a node has room for
    accelerator: str | None = None  # value of Ray's accelerator-type label, e.g. "H100"
    block_tokens: Count = 16
    kv_blocks: Count | None = None  # default: sized from measured free memory
    kv_dtype: Literal["auto", "float8_e4m3"] = "auto"  # auto: that of activations
    kv_memory_bytes: Count | None = None  # cap of that measure; default: 1 GiB on CPU, none on a GPU
    host_kv_bytes: Count | None = None  # a rank's host memory for what its KV blocks lose; default: none
    max_num_seqs: Count = 64
    max_step_tokens: Count = 512
    sleep_after_s: Annotated[float, Field(gt=0)] | None = None  # idle for so long, give GPU memory back
    tpot_ms: Annotated[float, Field(gt=0)] | None = None  # keep a stream's mean time a token within this
    threads: Count | None = None  # a rank; default: cores // ranks on the node
    executor: str = "serving.engine.worker:Worker"  # what runs a step's tensors
    mock: MockEngineConfig | None = None  # with it, nothing does

    @model_validator(mode="after")
    def _only_gpus_sleep(self) -> EngineConfig:
        if self.sleep_after_s is not None and self.device != "cuda":
            raise ValueError("sleep_after_s: gives a GPU's memory back; leave it out, or set device: cuda")
        return self

    @model_validator(mode="after")
    def _mock_stands_alone(self) -> EngineConfig:
        if self.mock is not None and (self.tensor_parallel > 1 or self.device == "cuda"):
            raise ValueError("mock: has one rank and needs no GPU; leave out tensor_parallel and device")
        if self.mock is not None and "executor" in self.model_fields_set:
            raise ValueError("mock: is an executor of its own; leave out executor")
        return self

    @property
    def executor_path(self) -> str:
        """The executor's module and name."""
        return self.executor if self.mock is None else "serving.engine.mock_executor:MockExecutor"


class RegionConfig(_Frozen):
    """Replicas in one region."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")]
    replicas: Count = 1


class AuthConfig(_Frozen):
    """API keys, never in the clear: SHA-256 hex digests, or a file with one key a line (mode 0600).

    With neither, the default key file is used, and created with a fresh key on first use.
    """

    key_sha256: tuple[str, ...] = ()
    key_file: str | None = None

    @field_validator("key_sha256")
    @classmethod
    def _is_digest(cls, digests: tuple[str, ...]) -> tuple[str, ...]:
        for digest in digests:
            if not re.fullmatch(r"[0-9a-f]{64}", digest):
                raise ValueError(
                    "give the SHA-256 hex digest of the key (64 characters), never the key itself"
                )
        return digests


class IngressConfig(_Frozen):
    """With a `port`, Ingress answers HTTP itself on each of its nodes; Serve's proxy costs several times as
    much. Without one, only Serve's proxy does.
    """

    replicas: Count = 1
    host: str = "127.0.0.1"
    port: Annotated[int, Field(gt=0, lt=1 << 16)] | None = None
    max_body_bytes: Count = 4 << 20
    request_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    auth: AuthConfig = AuthConfig()


class RoutingConfig(_Frozen):
    """Queueing when no replica has headroom, and pretend round trips between regions."""

    max_waiting_requests: Annotated[int, Field(ge=0)] = 1024
    max_wait_s: Annotated[float, Field(gt=0)] = 60.0
    pretend_rtt: bool = False  # wait the cluster map's round trips for real


class TracingConfig(_Frozen):
    exporter: Literal["none", "console", "otlp"] = "none"
    endpoint: str | None = None  # OTLP over HTTP, e.g. http://127.0.0.1:4318/v1/traces
    sample_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0


class SearoomConfig(_Frozen):
    """Everything `serving.app:build` needs to make the application."""

    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    regions: tuple[RegionConfig, ...] = (RegionConfig(name=DEFAULT_REGION),)
    home_region: str | None = None  # where Ingress and Router stand; default: the first region
    pin_regions: bool = False  # place by the node label ray.io/availability-region
    cluster_file: str | None = None
    cluster_map: ClusterMap | None = None
    ingress: IngressConfig = IngressConfig()
    routing: RoutingConfig = RoutingConfig()
    tracing: TracingConfig = TracingConfig()
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @model_validator(mode="after")
    def _regions_agree(self) -> SearoomConfig:
        names = [region.name for region in self.regions]
        if not names:
            raise ValueError("regions: name at least one region")
        if len(set(names)) != len(names):
            raise ValueError(f"regions: {names} names a region twice")
        if self.home_region is not None and self.home_region not in names:
            raise ValueError(f"home_region: {self.home_region!r} is not one of the regions {names}")
        if len(names) > 1 and not self.pin_regions:
            raise ValueError("pin_regions: must be true with several regions, or replicas land anywhere")
        if self.cluster_file is not None and self.cluster_map is not None:
            raise ValueError("cluster_file: give either a cluster_file or a cluster_map, not both")
        return self

    @model_validator(mode="after")
    def _dtype_has_a_device(self) -> SearoomConfig:
        if self.model.dtype in ("int4", "float8") and self.engine.device != "cuda":
            raise ValueError(f"model.dtype: {self.model.dtype} needs engine.device cuda; a CPU has int8")
        return self

    @property
    def dtype(self) -> str:
        """In which products are computed, with "auto" resolved.

        bfloat16, also for weights that are stored in 4 or 8 bits: its answers are the float32 model's
        (`python -m serving.bench engine --quality`). int8 is faster in batches on CPU, and less near.
        """
        return "bfloat16" if self.model.dtype == "auto" else self.model.dtype

    @property
    def kv_identity(self) -> str:
        """What the content of a block depends on besides its tokens and the weights: Ingress hashes it."""
        return self.dtype if self.engine.kv_dtype == "auto" else f"{self.dtype}, {self.engine.kv_dtype}"

    @property
    def home(self) -> str:
        return self.home_region or self.regions[0].name


def parse_config(args: dict[str, Any], source: str) -> SearoomConfig:
    """The config in `args`; raises ConfigError naming `source`, the key and the fix."""
    try:
        return SearoomConfig.model_validate(args)
    except ValidationError as invalid:
        raise ConfigError(_explain(invalid, source)) from invalid


def read_config(path: Path) -> SearoomConfig:
    """The config in a YAML file: either our keys at the top, or a Serve config with our `args`."""
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError as missing:
        raise ConfigError(f"{path}: there is no such file") from missing
    except yaml.YAMLError as broken:
        raise ConfigError(f"{path}: not valid YAML: {broken}") from broken
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold a mapping of keys")
    if "applications" in content:
        content = application_of(content, path).get("args") or {}
    return parse_config(content, str(path))


def application_of(serve_config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The one application of ours in a Serve config."""
    applications = serve_config.get("applications")
    if not isinstance(applications, list) or not all(isinstance(app, dict) for app in applications):
        raise ConfigError(f"{path}: applications: must be a list of mappings")
    ours = [app for app in applications if app.get("import_path") == "serving.app:build"]
    if len(ours) != 1:
        raise ConfigError(
            f"{path}: applications: needs exactly one with import_path serving.app:build, found {len(ours)}"
        )
    return ours[0]


def _explain(invalid: ValidationError, source: str) -> str:
    lines = []
    for error in invalid.errors():
        key = ".".join(str(part) for part in error["loc"])
        if error["type"] == "extra_forbidden":
            lines.append(f"{source}: unknown key {key!r}: remove it, or check its spelling")
        else:
            message = error["msg"].removeprefix("Value error, ")
            lines.append(f"{source}: {key + ': ' if key else ''}{message}")
    return "\n".join(lines)
