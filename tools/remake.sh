#!/usr/bin/env bash
# Remake what the bundled weights of Diffit-Fashion made: scores, pictures, the tour. Needs pip install -e ".[tools,test]".
#
#   bash tools/remake.sh [CHECKPOINT]      # bundles this ema.safetensors first
#
# The same command goes on where it was stopped; other weights begin anew. The last two parts take hours on a CPU. Scores
# are left in runs/remake/*/*.json, for docs/bundled_model.md, docs/image_space.md and docs/benchmarks.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[ $# = 0 ] || python tools/fashion.py bundle "$1"
weights=$(sha256sum < diffit/bundled/diffit_fashion.safetensors)
out=runs/remake/${weights:0:12}
mkdir -p "$out"

part() { # NAME COMMAND ...: run a command once for these weights
    [ -e "$out/$1.done" ] && return
    echo "now: $1"
    "${@:2}"
    touch "$out/$1.done"
}
samples() { # NAME NUMBER FLAGS ...: draw samples with seed 0 and score them
    part "$1" python sample.py --log_dir "$out/$1" --num_samples "$2" --batch_size 50 "${@:3}"
    part "$1_scores" bash eval_run.sh --log_dir "$out/$1" --json "$out/$1.json"
}

part readme python sample.py --log_dir "$out/readme"
cp "$out/readme/grid.png" docs/assets/fashion.png
samples guided 1000
sed -E 's#"(reference|samples)": ".*/#"\1": "#' "$out/guided.json" > diffit/bundled/scores.json
part attention python tools/attention_maps.py --num_samples 2 --class_labels 7 3 --out docs/assets/attention_maps.png
part denoising python tools/denoising.py
part tour python -m tests.test_tour
samples fast 1000 --fast True
part sweep python tools/sweep.py cfg_scale=1,1.25,1.5,2,4 guidance.schedule=constant,power_cosine --num_samples 250 \
    --out "$out/sweep" --plot docs/assets/guidance_sweep.png
samples unguided 10000 --cfg_cond False
