#!/usr/bin/env bash
# Measure on one GPU what this project says of GPUs: the tests, sampling, training, and a real training run.
#
#   bash tools/gpu_proof.sh OUT [MINUTES]
#
# Works for MINUTES (9 by default), then stops; the same command again goes on, and says 'all done' at the end. A part
# leaves OUT/PART.log, most of them OUT/PART.json, and OUT/PART.done; one that failed is shown and tried again next time.
# A part that is longer than what is left is put off, but training runs, which go on from their checkpoints.
# TOY=1 takes the smallest sizes, to try the script itself on a CPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=$(realpath -m "${1:?name the folder of the results}")
end=$((SECONDS + 60 * ${2:-9}))
python=${PYTHON:-python}
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
missing=0

# part NAME MINUTES COMMAND ...: run a command once, if its minutes are left; 0 minutes: it may be stopped at any time.
part() {
    local name=$1 minutes=$2 left=$((end - SECONDS)) code
    shift 2
    [ -e "$out/$name.done" ] && return
    missing=$((missing + 1))
    if [ "$left" -lt 20 ] || [ "$left" -lt $((60 * minutes)) ]; then
        echo "later: $name"
        return
    fi
    echo "now: $name"
    timeout --signal=TERM --kill-after=60 "$left" "$@" > "$out/$name.log" 2>&1
    code=$?
    case $code in
        0) touch "$out/$name.done"; missing=$((missing - 1)) ;;
        75 | 124 | 143) echo "goes on next time: $name" ;;
        *) echo "failed ($code): $name"; tail -n 15 "$out/$name.log" ;;
    esac
}

machine() {
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2> /dev/null
    "$python" - <<'PYTHON'
import platform
from importlib.metadata import version

import torch

print(platform.processor() or platform.machine(), "python", platform.python_version())
print({name: version(name) for name in ("torch", "torchvision", "diffusers", "timm", "numpy")})
print("CUDA", torch.version.cuda, "devices", torch.cuda.device_count(), "bf16", torch.cuda.is_bf16_supported())
PYTHON
}

benchmark() { # NAME MINUTES CASE BATCH PARTS
    part "$1" "$2" "$python" -m diffit.benchmark --cases "$3" --batch_size "$4" --parts "$5" --json "$out/$1.json" "${short[@]}"
}

train() { # NAME RECIPE FLAGS ...: train, then score 10,000 unguided and 1,000 recommended samples
    local name=$1 recipe=$2 run=$out/runs/$1
    shift 2
    part "train_$name" 0 "$python" train.py --config "configs/$recipe.yaml" --run_dir "$run" "$@"
    [ -e "$out/train_$name.done" ] || return
    for kind in unguided recommended; do
        part "score_${name}_$kind" 1 bash -c '
            set -e
            weights=$(ls -d "$1"/checkpoints/[0-9]*/ | tail -n 1)ema.safetensors
            folder=$1/samples_$2
            if [ "$2" = unguided ]; then more=(--cfg_cond False --num_samples "$4"); else more=(--num_samples "$5"); fi
            "$0" sample.py --model_path "$weights" --log_dir "$folder" --batch_size 500 "${more[@]}"
            PYTHON=$0 bash eval_run.sh --log_dir "$folder" --json "$3"
        ' "$python" "$run" "$kind" "$out/score_${name}_$kind.json" "$unguided" "$recommended"
    done
}

if [ -n "${TOY:-}" ]; then
    short=(--rounds 1 --seconds 1)
    unguided=40 recommended=20
    part machine 0 bash -c "$(declare -f machine); python=$python; machine"
    part tests_nn 0 "$python" -m pytest tests/nn
    benchmark sampling_fashion 0 Diffit-Fashion 2 sampling
    benchmark training_fashion 0 Diffit-Fashion 2 training
    train latent fashion_mnist_laptop --steps 4 --batch_size 8 --save_every 2
else
    short=()
    unguided=10000 recommended=1000
    part machine 0 bash -c "$(declare -f machine); python=$python; machine"
    # The GPU's own tests first: nothing waits for the device, fp16, compiled networks, NCCL.
    for folder in training models sampling diffusion data nn; do
        part "tests_$folder" 3 "$python" -m pytest "tests/$folder"
    done
    for batch in 1 16 64; do
        benchmark "sampling_256_$batch" 3 Diffit-256 "$batch" sampling
    done
    for batch in 1 8; do
        benchmark "sampling_512_$batch" 4 Diffit-512 "$batch" sampling
    done
    for batch in 64 256; do
        benchmark "training_256_$batch" 3 Diffit-256 "$batch" training
    done
    benchmark image_cifar10 3 ImageDiffit-CIFAR10 512 training
    benchmark image_ffhq64 3 ImageDiffit-FFHQ64 256 training
    train latent fashion_mnist
    train flow fashion_mnist --process flow --flow.time_distribution logit_normal --sampling.sampler heun \
        --sampling.num_sampling_steps 25
    train image fashion_mnist_image
fi
if [ "$missing" = 0 ]; then echo "all done: $out"; else echo "$missing parts are left: the same command goes on"; fi
