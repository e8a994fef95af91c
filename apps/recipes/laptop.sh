# The paper's order on a laptop's CPU with a real 0.5B. train.jsonl.gz holds records with gold answers (49,006 here, from
# which `prepare` chooses a mix of labels with short prompts). On two cores without AVX-512 or bfloat16: `sft` 26 minutes,
# all up to the end of `ckd` 65 minutes, 14 GB. A CPU with bfloat16 instructions is faster without --dtype float32.
# tests/README.md, *Official BFCL and ACEBench scores*, has the scores of runs/teacher/model and runs/ckd/model, made by
#     python star.py bfcl --model runs/ckd/model --items 35 --max-new-tokens 128 --dtype float32 --out runs/bfcl
# It also says why `simrl` refines the teacher, and only on requests that want calls: the CKD model, after 16 steps, makes
# too few calls that pay, and learned to refuse everything. Sim-RL took 20 minutes (45 on busy cores) and 16 GB.
python star.py prepare --data train.jsonl.gz --model models/Qwen2.5-Coder-0.5B-Instruct \
    --max-prompt-tokens 384 --size 4000 --seed 1 --out runs/sft.jsonl.gz
python star.py prepare --data train.jsonl.gz --model models/Qwen2.5-Coder-0.5B-Instruct \
    --max-prompt-tokens 384 --size 4000 --seed 2 --out runs/prompts.jsonl.gz
python star.py sft --model models/Qwen2.5-Coder-0.5B-Instruct --data runs/sft.jsonl.gz --limit 216 --hold-out 16 \
    --batch-size 8 --micro-batch-tokens 1024 --lr 3e-5 --valid-every 25 --save-every 10 --dtype float32 --out runs/teacher
python star.py rollout --model runs/teacher/model --data runs/prompts.jsonl.gz --limit 120 --n 4 --max-new-tokens 128 \
    --dtype float32 --out runs/rollouts.jsonl
python star.py ckd --teacher runs/teacher/model --student models/Qwen2.5-Coder-0.5B-Instruct \
    --data runs/rollouts.jsonl --cache runs/teacher-cache --hold-out 40 --batch-size 16 --micro-batch-tokens 1024 \
    --lr 3e-5 --valid-every 25 --save-every 10 --dtype float32 --out runs/ckd
python star.py prepare --data runs/prompts.jsonl.gz --labels single parallel --out runs/calls.jsonl.gz
python star.py simrl --model runs/teacher/model --data runs/calls.jsonl.gz --prompts-per-step 4 --batch-size 32 \
    --max-new-tokens 80 --max-concurrent 32 --micro-batch-tokens 1024 --lr 5e-6 --steps 16 --save-every 4 \
    --dtype float32 --out runs/refined
