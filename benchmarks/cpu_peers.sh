#!/usr/bin/env bash
# Every CPU comparison in one go: b1, uniform16 and mixed16 in bf16 beside transformers, vLLM and llama.cpp; int4 b1
# beside llama.cpp's Q4_0; int8 uniform16 beside its Q8_0 and vLLM in bf16. About a quarter of an hour on two idle cores.
#
#   VLLM_PYTHON=ENV/bin/python LLAMA_BIN=llama.cpp/build/bin benchmarks/cpu_peers.sh MODEL GGUF [FLAG ...]
#
# MODEL  a folder in Hugging Face format; without *.safetensors in it, the weights are dummies
# GGUF   the folder that benchmarks/make_gguf.sh filled from it
# FLAG   for every benchmarks/offline.py, such as --rounds 3
#
# PYTHON (.venv/bin/python here, else python3) runs it. A comparison that fails is named at the end, the others still run.
set -uo pipefail

if [[ $# -lt 2 ]]; then
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2
    exit 2
fi
model=$(cd "$1" && pwd) || exit 1
gguf=$(cd "$2" && pwd)/$(basename "$model") || exit 1
shift 2
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[[ -x $python ]] || python=python3
load_format=auto
compgen -G "$model/*.safetensors" >/dev/null || load_format=dummy

failed=()
compare() { # NAME, then flags of offline.py
    local name=$1
    shift
    echo
    echo "== $name ($(date '+%H:%M:%S'), load $(cut -d ' ' -f 1 /proc/loadavg 2>/dev/null || echo unknown))"
    local start=$SECONDS
    "$python" "$root/benchmarks/offline.py" --model-path "$model" --load-format "$load_format" --ceilings "$@" \
        || failed+=("$name")
    echo "took $((SECONDS - start)) s"
}

all=transformers,vllm,llama.cpp
compare 'bf16 b1' --workload b1 --against $all --gguf "$gguf-bf16.gguf" "$@"
compare 'bf16 uniform16' --workload uniform16 --against $all --gguf "$gguf-bf16.gguf" "$@"
compare 'bf16 mixed16' --workload mixed16 --against $all --gguf "$gguf-bf16.gguf" "$@"
compare 'int4 b1' --workload b1 --quantization int4 --against llama.cpp --gguf "$gguf-q4_0.gguf" "$@"
compare 'int8 uniform16' --workload uniform16 --quantization int8 --against vllm,llama.cpp --gguf "$gguf-q8_0.gguf" "$@"

echo
echo "took $SECONDS s in all"
if [[ ${#failed[@]} -gt 0 ]]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
