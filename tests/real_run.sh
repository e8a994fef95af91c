#!/usr/bin/env bash
# The real run of README.md beside this file: a 0.5B teacher made by sft on real records, distilled into the 0.5B as
# shipped by ckd, and beside it cross-entropy on the same rollouts in the same order (equal tokens). About an hour on
# two quiet CPU cores.
#
#   tests/real_run.sh MODEL_FOLDER RECORDS.jsonl.gz VALIDATION.jsonl.gz OUT [LARGER_TEACHER_FOLDER]
#
# With a larger teacher (the 1.5B) it ends with one live step of it: its time and memory.
set -euo pipefail
model=$1 train=$2 valid=$3 out=$4
cd "$(dirname "$0")/.."
mkdir -p "$out"
lines() { gzip -dc "$1" | sed -n "$2p"; }
lines "$train" 1,640 > "$out/sft.jsonl"          # the caps below keep about a third of each
lines "$train" 641,960 > "$out/prompts.jsonl"
lines "$valid" 1,130 > "$out/valid.jsonl"

caps="--max-prompt-tokens 512"
small="$caps --micro-tokens 2048 --lr 3e-5 --save-every 10 --samples 10"
time python star.py sft --model "$model" --data "$out/sft.jsonl" --hold-out 8 --valid-every 1000 --batch 8 \
    $small --out "$out/teacher"
for part in prompts valid; do
    time python star.py rollout --model "$out/teacher/model" --data "$out/$part.jsonl" --n 4 --max-new-tokens 128 \
        $caps --out "$out/rollouts-$part.jsonl"
done
for objective in ckd ce; do
    time python star.py ckd --teacher "$out/teacher/model" --student "$model" --objective $objective \
        --data "$out/rollouts-prompts.jsonl" --valid "$out/rollouts-valid.jsonl" --valid-every 9 --batch 16 \
        --cache "$out/teacher-cache" $small --out "$out/$objective"
done
# The model as shipped and both students on 200 validation records, greedily: a quarter of an hour each.
python star.py eval --model "$model" --data "$valid" --limit 200 --rows 32 --max-new-tokens 128 --out "$out/eval-base"
python star.py eval --model "$out/ce/model" --compare "$out/eval-base" --data "$valid" --limit 200 --rows 32 \
    --max-new-tokens 128 --out "$out/eval-ce"
for other in ce base; do
    python star.py eval --model "$out/ckd/model" --compare "$out/eval-$other" --data "$valid" --limit 200 --rows 32 \
        --max-new-tokens 128 --out "$out/eval-ckd" --resume
done
# What needs requirements-dev.txt: the curves, and the exported student in transformers (the same logits).
python star.py plot "$out/ckd" "$out/ce" --out "$out/curves.png"
STAR_REAL_MODEL="$out/ckd/model" python -m pytest -q tests/test_model.py -k real_weights
if [ -n "${5:-}" ]; then
    time python star.py ckd --teacher "$5" --student "$model" --data "$out/rollouts-prompts.jsonl" --limit 12 \
        --hold-out 0 --batch 16 --steps 1 $small --samples 0 --out "$out/live-step"
fi
