#!/usr/bin/env bash
# Sim-RL on a real 0.5B that knows the form of a call (the teacher of real_run.sh: 27 steps of sft), and an evaluation
# on 200 validation records before and after. On two busy CPU cores: 55 minutes of training, and on one core 7 minutes
# of evaluation for each model.
#
#   tests/simrl_run.sh OUT_OF_REAL_RUN RECORDS.jsonl.gz VALIDATION.jsonl.gz OUT
#
# RESUME=1 continues a stopped run.
set -euo pipefail
model=$1/teacher/model train=$2 valid=$3 out=$4
cd "$(dirname "$0")/.."
mkdir -p "$out"
gzip -dc "$train" | sed -n 961,1700p > "$out/prompts.jsonl"  # none of them is in real_run.sh

caps="--max-prompt-tokens 512"
time python star.py simrl --model "$model" --data "$out/prompts.jsonl" --prompts-per-step 8 --n 8 --batch-size 32 \
    --steps 16 --lr 1e-5 --max-new-tokens 80 --micro-batch-tokens 1024 --save-every 2 $caps --out "$out/simrl" \
    ${RESUME:+--resume}
time python star.py eval --model "$out/simrl/model" --compare "$model" --data "$valid" --limit 757 $caps \
    --max-concurrent 32 --max-new-tokens 96 --out "$out/eval" ${RESUME:+--resume}
python star.py plot "$out/simrl" --out "$out/simrl.png"
