#!/usr/bin/env bash
# The real run of tests/README.md: distil a real 0.5B model on real records.
#
#   1. sft trains a teacher from MODEL_FOLDER.
#   2. The teacher answers other prompts.
#   3. Two students start from MODEL_FOLDER: ckd trains one on these answers, cross-entropy the other. Both see the
#      same sequences in the same order.
#   4. eval scores MODEL_FOLDER and both students.
#
# Steps 1 to 3 take 71 minutes on two busy CPU cores. Step 4 takes 16 minutes per model.
#
#   tests/real_run.sh MODEL_FOLDER RECORDS.jsonl.gz VALIDATION.jsonl.gz OUT [LARGER_TEACHER_FOLDER]
#
# With LARGER_TEACHER_FOLDER (the 1.5B), a last step trains with that teacher in memory instead of a cache. It shows
# the time and memory of such a step.
set -euo pipefail
model=$1 train=$2 valid=$3 out=$4
cd "$(dirname "$0")/.."
mkdir -p "$out"
lines() { gzip -dc "$1" | sed -n "$2p"; }
lines "$train" 1,640 > "$out/sft.jsonl"          # --max-prompt-tokens, below, keeps about a third
lines "$train" 641,960 > "$out/prompts.jsonl"
lines "$valid" 1,130 > "$out/valid.jsonl"

caps="--max-prompt-tokens 512"
small="$caps --micro-batch-tokens 2048 --lr 3e-5 --save-every 10 --samples 10"
time python star.py sft --model "$model" --data "$out/sft.jsonl" --hold-out 8 --valid-every 1000 --batch-size 8 \
    $small --out "$out/teacher"
for part in prompts valid; do
    time python star.py rollout --model "$out/teacher/model" --data "$out/$part.jsonl" --n 4 --max-new-tokens 128 \
        $caps --out "$out/rollouts-$part.jsonl"
done
for objective in ckd ce; do
    time python star.py ckd --teacher "$out/teacher/model" --student "$model" --objective $objective \
        --data "$out/rollouts-prompts.jsonl" --valid "$out/rollouts-valid.jsonl" --valid-every 9 --batch-size 16 \
        --cache "$out/teacher-cache" $small --out "$out/$objective"
done
# Greedy answers to 200 validation records, by MODEL_FOLDER and both students.
score=(--data "$valid" --limit 200 --max-concurrent 32 --max-new-tokens 128)
python star.py eval --model "$model" "${score[@]}" --out "$out/eval-base"
python star.py eval --model "$out/ce/model" --compare "$out/eval-base" "${score[@]}" --out "$out/eval-ce"
for other in ce base; do
    python star.py eval --model "$out/ckd/model" --compare "$out/eval-$other" "${score[@]}" --out "$out/eval-ckd" --resume
done
# The curves, and a comparison of the student's logits with those of transformers (needs requirements-dev.txt).
python star.py plot "$out/ckd" "$out/ce" --out "$out/curves.png"
STAR_REAL_MODEL="$out/ckd/model" python -m pytest -q tests/test_model.py -k real_weights
if [ -n "${5:-}" ]; then
    time python star.py ckd --teacher "$5" --student "$model" --data "$out/rollouts-prompts.jsonl" --limit 12 \
        --hold-out 0 --batch-size 16 --steps 1 $small --samples 0 --out "$out/live-step"
fi
