#!/usr/bin/env bash
# The same streams through HTTP: what `searoom up` serves, beside `vllm serve` on the same weights.
#
#   tests/benchmarks/http.sh [FOLDER] [STREAMS] [ROUNDS]
#
# FOLDER is where peers.sh made its environments (default .peers). Both servers stay up, one works at a
# time, and they take turns for ROUNDS rounds (default 3) of STREAMS (default 1,8,16,64). `searoom` is
# the one on the PATH; SEAROOM_UP holds further options for `searoom up`.
set -euo pipefail

folder=$(cd "${1:-.peers}" && pwd)
streams=${2:-1,8,16,64}
rounds=${3:-3}
port=8700
work=$(mktemp -d)
export SEAROOM_API_KEY VLLM_API_KEY
VLLM_API_KEY=$(head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n')

searoom_pid= vllm_pid=
finish() {
    [ -z "$searoom_pid" ] || { searoom down >/dev/null 2>&1 || true; wait "$searoom_pid" || true; }
    [ -z "$vllm_pid" ] || { kill "$vllm_pid" && wait "$vllm_pid" || true; }
    rm -r "$work"
}
trap finish EXIT

# await SECONDS COMMAND...: until it succeeds.
await() {
    local left=$1
    shift
    until "$@" >/dev/null 2>&1; do
        left=$((left - 1))
        [ $left -gt 0 ] || { echo "error: not ready in time: $*" >&2; tail -n 20 "$work"/*.log >&2; exit 1; }
        sleep 1
    done
}

weights=$(python - <<'PY'
from serving.bench.engine.peer_weights import bfloat16_folder
from serving.model_files import resolve
from serving.model_spec import read_model_spec

files = resolve("embedded")
print(bfloat16_folder(files, read_model_spec(files.folder)))
PY
)

searoom up ${SEAROOM_UP:-} >"$work/searoom.log" 2>&1 &
searoom_pid=$!
await 120 searoom status
SEAROOM_API_KEY=$(python -c "from serving.auth import load_key; print(load_key())")

lib="$folder/vllm/lib"
LD_PRELOAD="$lib/libtcmalloc_minimal.so:$lib/libiomp5.so" VLLM_CPU_KVCACHE_SPACE=2 HF_HUB_OFFLINE=1 \
    VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL=WARNING "$folder/vllm/bin/vllm" serve "$weights" \
    --host 127.0.0.1 --port $port --served-model-name smollm2 --dtype bfloat16 --max-model-len 2048 \
    --max-num-seqs 64 >"$work/vllm.log" 2>&1 &
vllm_pid=$!
await 400 curl -sf -m 2 "http://127.0.0.1:$port/health"

for round in $(seq "$rounds"); do
    echo "round $round: searoom"
    python -m serving.bench load --streams "$streams"
    sleep 1
    echo "round $round: vllm serve"
    SEAROOM_API_KEY=$VLLM_API_KEY python -m serving.bench load --endpoint "http://127.0.0.1:$port" --streams "$streams"
    sleep 1
done
