#!/usr/bin/env bash
# Sim-RL on a real 0.5B that knows the form of a call (the teacher of real_run.sh: 27 steps of sft), and what it changed
# on 200 validation records. 55 minutes of training on two busy CPU cores, and 7 of evaluation a model on one.
#
#   tests/simrl_run.sh OUT_OF_REAL_RUN RECORDS.jsonl.gz VALIDATION.jsonl.gz OUT
set -euo pipefail
model=$1/teacher/model train=$2 valid=$3 out=$4
cd "$(dirname "$0")/.."
mkdir -p "$out"
gzip -dc "$train" | sed -n 961,1700p > "$out/prompts.jsonl"  # not those of real_run.sh

caps="--max-prompt-tokens 512"
time python star.py simrl --model "$model" --data "$out/prompts.jsonl" --prompts 8 --n 8 --batch 32 --steps 16 \
    --lr 1e-5 --max-new-tokens 80 --micro-tokens 1024 --save-every 2 $caps --out "$out/simrl" ${RESUME:+--resume}
time python star.py eval --model "$out/simrl/model" --compare "$model" --data "$valid" --limit 757 $caps --rows 32 \
    --max-new-tokens 96 --out "$out/eval" ${RESUME:+--resume}
python star.py plot "$out/simrl" --out "$out/simrl.png"
