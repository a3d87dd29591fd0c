#!/usr/bin/env bash
# Everything that wants a GPU, in one call:  bash tools/gpu_checks.sh [OUTPUT_FOLDER]
# Tests, then the built-in and (where $KNOWSAM_DATA holds it) the Kvasir experiment; logs and tables go to OUTPUT_FOLDER.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-runs/gpu_checks}
mkdir -p "$out"
python -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' || exit 1
python -m pytest -q -m gpu 2>&1 | tee "$out/tests.log"
python tools/benchmark.py step parts data inference prediction --device cuda --json "$out/benchmark.json" \
    --compare train.precision=fp32 --compare train.precision=bf16 \
    --set data.labelled_batch=12 --set data.unlabelled_batch=12 2>&1 | tee "$out/benchmark.log"
experiments=(experiments/quickstart.yaml)
[ -d "${KNOWSAM_DATA:-data}/kvasir_seg" ] && experiments+=(experiments/kvasir_10pct_small.yaml)
for experiment in "${experiments[@]}"; do
    name=$(basename "$experiment" .yaml)
    for method in knowsam mean_teacher supervised; do
        python tools/train.py "$experiment" "method.name=$method" train.device=cuda "run=$out/$name/$method" \
            2>&1 | tee "$out/$name-$method.log"
    done
    python tools/evaluate.py "$out/$name"/* --device cuda 2>&1 | tee "$out/$name-table.log"
done
