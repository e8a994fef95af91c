#!/usr/bin/env bash
# An hour of Sim-RL and then of CKD on the bundled models; the picture shows the memory in use at every step.
set -uo pipefail  # not -e: Ctrl-C after an hour is the end that is wanted
cd "$(dirname "$0")/.."
common="--device cpu --dtype float32 --lr 1e-5 --batch-size 64 --micro-batch-tokens 2048 --save-every 50
    --data data/tiny/train.jsonl.gz --valid data/tiny/values.jsonl.gz --valid-limit 64"
timeout -s INT 3720 python star.py simrl --model data/tiny/student $common --steps 100000 --valid-every 200 \
    --prompts-per-step 16 --max-concurrent 128 --max-new-tokens 128 --out runs/soak/simrl
timeout -s INT 3720 python star.py ckd --teacher data/tiny/teacher --student data/tiny/student $common \
    --k 4 --m 4 --steps 100000 --valid-every 20 --valid-answers 64 --out runs/soak/ckd
python star.py plot runs/soak/simrl runs/soak/ckd --out tests/soak.png
