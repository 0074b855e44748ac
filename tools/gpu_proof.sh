#!/usr/bin/env bash
# Measure on a GPU what this project says of GPUs: its own tests, sampling, training, train.py itself, several GPUs.
#
#   bash tools/gpu_proof.sh OUT [MINUTES]
#
# Works for MINUTES (9 by default), one process after the other, the most telling first, and prints a table at the end,
# also when time ran out. A part leaves OUT/PART.log and most of them OUT/PART.json; OUT/summary.json holds all of them.
# The same command again goes on with what is missing. In front of it:
#   TRAIN_BATCH=128    trains with twice the images, where 140 GB hold them (and then with 256)
#   TOY=1              tries the script itself at the smallest sizes, on a CPU
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=$(realpath -m "${1:?name the folder of the results}")
end=$((SECONDS + $(awk "BEGIN { print int(60 * ${2:-9}) }")))
python=${PYTHON:-python}
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$out/inductor}
missing=0

"$python" - <<'PYTHON' || exit
import importlib.util, sys

needed = "torch torchvision timm diffusers numpy scipy PIL tqdm safetensors huggingface_hub jsonargparse"
needed += " docstring_parser typeshed_client lazy_loader yaml pytest tensorboard"
missing = [name for name in needed.split() if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"Python packages are missing: {' '.join(missing)}")
PYTHON

# part NAME SECONDS COMMAND ...: run a command once, for so long at most.
part() {
    local name=$1 limit=$2 left=$((end - SECONDS)) code
    shift 2
    [ -e "$out/$name.done" ] && return
    missing=$((missing + 1))
    if [ "$left" -lt 15 ]; then
        echo "later: $name"
        return
    fi
    timeout --signal=TERM --kill-after=10 "$((limit < left ? limit : left))" "$@" > "$out/$name.log" 2>&1
    code=$?
    echo "$name: exit code $code after $((left - end + SECONDS)) s"
    if [ "$code" = 0 ]; then
        touch "$out/$name.done"
        missing=$((missing - 1))
    else
        tail -n 12 "$out/$name.log" | cut -c 1-300
    fi
}

benchmark() { # NAME SECONDS CASE BATCH PART VARIANT ...
    local name=$1 seconds=$2 flags=(--cases "$3" --batch_size "$4" --parts "$5")
    shift 5
    flags+=(--variants "$@" --seconds 15 --json "$out/$name.json")
    part "$name" "$seconds" "$python" -m diffit.benchmark "${flags[@]}" "${toy[@]}"
}

train() { # NAME SECONDS LAUNCHER FLAGS ...: a few hundred steps of train.py, its rate in the log
    local name=$1 seconds=$2 launcher=$3
    shift 3
    part "$name" "$seconds" $launcher train.py --config "configs/$recipe.yaml" --run_dir "$out/runs/$name" \
        --steps "$steps" --tracker none "$@"
}

if [ -n "${TOY:-}" ]; then
    toy=(--rounds 1 --depth 1)
    large=Diffit-256 recipe=debug steps=4 gpus=2 b16=1 b64=1 b512=1 train=1 fashion=2
    more=(--batch_size 8 --data.workers 0 --log_every 2 --preview_every 0)
else
    toy=()
    large=Diffit-512 recipe=fashion_mnist steps=400 gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
    b16=16 b64=64 b512=8 train=${TRAIN_BATCH:-64} fashion=1024 more=(--data.workers 14)
fi
one="$python" all="$python -m torch.distributed.run --standalone --nproc_per_node=$gpus"

part tests 100 "$python" -m pytest tests/models tests/diffusion tests/training/test_step.py tests/sampling/test_generate.py -k gpu
benchmark sampling_256_16 110 Diffit-256 $b16 sampling default compile fast
benchmark sampling_512 120 $large $b512 sampling default compile fast
benchmark training_256 150 Diffit-256 $train training default compile+autocast
benchmark sampling_256_64 80 Diffit-256 $b64 sampling fast
benchmark training_256_large 120 Diffit-256 $((2 * train)) training compile+autocast
benchmark training_fashion 90 Diffit-Fashion $fashion training autocast compile+autocast
train train 90 "$one" "${more[@]}"
if [ "$gpus" -gt 1 ]; then
    train train_ddp 90 "$all" "${more[@]}"
    train train_fsdp 90 "$all" "${more[@]}" --parallel fsdp --compile False
    part sampling_ranks 60 $all sample.py --num_samples $((8 * gpus)) --batch_size 4 --log_dir "$out/samples"
fi
benchmark training_256_tf32 90 Diffit-256 $train training compile
benchmark sampling_256_skip 90 Diffit-256 $b16 sampling skip

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2> /dev/null
"$python" - "$out" <<'PYTHON'
import json, sys
from importlib.metadata import version
from pathlib import Path

out = Path(sys.argv[1])
found = {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json")) if path.stem != "summary"}
found["versions"] = {name: version(name) for name in ("torch", "torchvision", "diffusers", "timm", "numpy")}
print(found["versions"])
for log in sorted(out.glob("runs/*/log.jsonl")):
    found[log.parent.name] = lines = [line for line in map(json.loads, log.open()) if "images_per_s" in line]
    print(log.parent.name, *(f"{line['images_per_s']:.0f} images/s at step {line['step']}" for line in lines[-1:]))
(out / "summary.json").write_text(json.dumps(found))
PYTHON
grep -H '^|' "$out"/*.log | sed "s|^$out/||" # the tables
if [ "$missing" = 0 ]; then echo "all done: $out"; else echo "$missing parts are left: the same command goes on"; fi
