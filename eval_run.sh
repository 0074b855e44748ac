#!/usr/bin/env bash
# Score samples as ADM does: bash eval_run.sh [REFERENCE.npz] [SAMPLES.npz] [flags of evaluations/evaluator.py]
# or several in one table: bash eval_run.sh [REFERENCE.npz] --compare SAMPLES SAMPLES ...
# Without arguments: the newest samples_*.npz under logs/, against ADM's reference of that size. Works from any folder.
exec "${PYTHON:-python}" "$(dirname "${BASH_SOURCE[0]}")/evaluations/evaluator.py" "$@"
