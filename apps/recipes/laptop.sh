# The whole order on a laptop's CPU with a real 0.5B, close to tests/real_run.sh (71 minutes and 20 GB on two cores, with a
# second student) and tests/simrl_run.sh (55 minutes), whose settings differ a little. Not run in this form.
# train.jsonl.gz: records that `star.py prepare` has written. On a CPU without bfloat16 instructions add --dtype float32.
python star.py sft --model models/Qwen2.5-Coder-0.5B-Instruct --data train.jsonl.gz --limit 640 --max-prompt-tokens 512 \
    --batch-size 8 --micro-batch-tokens 2048 --lr 3e-5 --save-every 10 --out runs/teacher
python star.py rollout --model runs/teacher/model --data train.jsonl.gz --limit 960 --n 4 --max-new-tokens 128 \
    --max-prompt-tokens 512 --out rollouts.jsonl
python star.py ckd --teacher runs/teacher/model --student models/Qwen2.5-Coder-0.5B-Instruct --data rollouts.jsonl \
    --cache runs/teacher-cache --batch-size 16 --micro-batch-tokens 2048 --max-prompt-tokens 512 --lr 3e-5 \
    --save-every 10 --out runs/ckd
python star.py simrl --model runs/ckd/model --data train.jsonl.gz --max-prompt-tokens 512 --prompts-per-step 4 \
    --batch-size 16 --max-new-tokens 128 --micro-batch-tokens 2048 --lr 1e-5 --steps 16 --out runs/star
