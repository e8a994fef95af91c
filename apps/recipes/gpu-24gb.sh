# CKD and Sim-RL of Qwen3-0.6B from Qwen3-1.7B on one GPU of 24 GB. Not run on one of this size.
# train.jsonl.gz and valid.jsonl.gz: two parts of what `star.py prepare` writes.
#
# CKD 20.7 GB with the teacher in memory, Sim-RL 21.3 GB. Computed by
#   python star.py estimate --student models/Qwen3-0.6B --teacher models/Qwen3-1.7B --gpus 1 --gradient-checkpointing \
#       --micro-batch-tokens 2048 --max-concurrent 16 --max-prompt-tokens 1024 --prompts 4000 --steps 200 --prompts-per-step 8
# Hours on a GPU that reaches a third of an H200's rates (--tflops 80 --bandwidth 0.2): 2.7, 0.3 and 1.0.
python star.py rollout --model models/Qwen3-1.7B --data train.jsonl.gz --limit 4000 --max-prompt-tokens 1024 \
    --max-concurrent 16 --out rollouts.jsonl
python star.py ckd --teacher models/Qwen3-1.7B --student models/Qwen3-0.6B --data rollouts.jsonl --lr 1e-5 \
    --batch-size 32 --gradient-checkpointing --micro-batch-tokens 2048 --max-prompt-tokens 1024 --out runs/ckd
python star.py simrl --model runs/ckd/model --data train.jsonl.gz --prompts-per-step 8 --batch-size 32 --lr 1e-5 \
    --steps 200 --gradient-checkpointing --micro-batch-tokens 2048 --max-prompt-tokens 1024 --max-concurrent 16 \
    --out runs/star
python star.py eval --model models/Qwen3-0.6B --data valid.jsonl.gz --n 8 --max-concurrent 16 --out evals/student
python star.py eval --model runs/star/model --compare evals/student --data valid.jsonl.gz --n 8 --max-concurrent 16 --out evals/star
