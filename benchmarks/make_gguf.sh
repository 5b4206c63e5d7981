#!/usr/bin/env bash
# Makes the GGUF files that llama.cpp runs in benchmarks/offline.py: NAME-bf16.gguf, NAME-q8_0.gguf and NAME-q4_0.gguf.
#
#   benchmarks/make_gguf.sh LLAMA_CPP MODEL OUT
#
# LLAMA_CPP  its source tree, with llama-quantize built (build/bin, or the folder in LLAMA_BIN)
# MODEL      a folder in Hugging Face format; without *.safetensors in it, random bf16 weights of its shape are made
# OUT        where the files go; NAME is MODEL's last part
#
# PYTHON (python3) is an interpreter with torch, transformers, numpy, pyyaml, tqdm, requests and sentencepiece, which is
# what llama.cpp's convert_hf_to_gguf.py imports; an environment of its own is best. Files that are there stay as they are.
set -euo pipefail

if [[ $# -ne 3 ]]; then
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2
    exit 2
fi
llama_cpp=$1
model=$(cd "$2" && pwd)
mkdir -p "$3"
out=$(cd "$3" && pwd)
name=$(basename "$model")
python=${PYTHON:-python3}
quantize=${LLAMA_BIN:-$llama_cpp/build/bin}/llama-quantize
[[ -f $llama_cpp/convert_hf_to_gguf.py ]] || { echo "$llama_cpp: no convert_hf_to_gguf.py in it" >&2; exit 1; }
[[ -x $quantize ]] || { echo "$quantize: not there; build the target llama-quantize" >&2; exit 1; }

weights=$model
if [[ ! -f $out/$name-bf16.gguf ]]; then
    if ! compgen -G "$model/*.safetensors" >/dev/null; then
        weights=$out/$name-random
        echo "no weights in $model: making random ones in $weights" >&2
        mkdir -p "$weights"
        HF_HUB_OFFLINE=1 "$python" - "$model" "$weights" <<'PYTHON'
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM

torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1])).save_pretrained(sys.argv[2])
PYTHON
        for file in tokenizer.json tokenizer_config.json vocab.json merges.txt generation_config.json; do
            [[ ! -f $model/$file ]] || cp "$model/$file" "$weights/"
        done
    fi
    # Into a name of its own first, so that a run cut short leaves no half file under the final name.
    HF_HUB_OFFLINE=1 "$python" "$llama_cpp/convert_hf_to_gguf.py" "$weights" --outtype bf16 --outfile "$out/$name.part"
    mv "$out/$name.part" "$out/$name-bf16.gguf"
fi
for type in Q8_0 Q4_0; do
    file=$out/$name-${type,,}.gguf
    [[ ! -f $file ]] || continue
    "$quantize" "$out/$name-bf16.gguf" "$out/$name.part" "$type"
    mv "$out/$name.part" "$file"
done
ls -l "$out"/"$name"-*.gguf
