# The released runs: distil Teacher-8B into 0.6B, 1.7B and 4B, then Sim-RL, on one node of 8 GPUs of 80 GB. Not run.
# Settings are the commands' defaults, as released but for the mean of the loss: CKD at 3e-6, k = m = 100, lambda = 10;
# Sim-RL at 3e-7, 128 prompts x 8 samples a step, 3 episodes. Memory and hours are those of
#   python star.py estimate --student models/Qwen3-0.6B --teacher models/Teacher-8B --gpus 8 --gradient-checkpointing \
#       --micro-batch-tokens 8192 --max-concurrent 64
# for 128,000 prompts of 600 tokens x 8 responses of 250 and, in Sim-RL, 1,000 steps. With longer thoughts, they grow.
# xlam.jsonl and toolace.jsonl: your records (README.md, *With real models*).
python star.py prepare --data xlam.jsonl toolace.jsonl --model models/Teacher-8B --out train.jsonl.gz

# The teacher answers: 54 GB a GPU (with --max-new-tokens 2048), 4.1 hours
torchrun --nproc-per-node 8 --shutdown-timeout 3600 -- star.py rollout --model models/Teacher-8B --data train.jsonl.gz \
    --think on --max-new-tokens 2048 --max-concurrent 64 --out rollouts.jsonl

# 0.6B. CKD: 14 GB, 0.9 hours. Sim-RL: 29 GB, 1.6 hours
torchrun --nproc-per-node 8 --shutdown-timeout 3600 -- star.py ckd --teacher models/Teacher-8B --student models/Qwen3-0.6B \
    --data rollouts.jsonl --think on --max-response-tokens 2048 --gradient-checkpointing --micro-batch-tokens 8192 \
    --out runs/ckd-0.6b
torchrun --nproc-per-node 8 --shutdown-timeout 3600 -- star.py simrl --model runs/ckd-0.6b/model --data train.jsonl.gz \
    --think on --gradient-checkpointing --micro-batch-tokens 8192 --max-concurrent 64 --out runs/star-0.6b

# 1.7B. CKD: 18 GB, 1.3 hours. Sim-RL: 35 GB, 3.3 hours
torchrun --nproc-per-node 8 --shutdown-timeout 3600 -- star.py ckd --teacher models/Teacher-8B --student models/Qwen3-1.7B \
    --data rollouts.jsonl --think on --max-response-tokens 2048 --gradient-checkpointing --micro-batch-tokens 8192 \
    --out runs/ckd-1.7b
torchrun --nproc-per-node 8 --shutdown-timeout 3600 -- star.py simrl --model runs/ckd-1.7b/model --data train.jsonl.gz \
    --think on --gradient-checkpointing --micro-batch-tokens 8192 --max-concurrent 64 --out runs/star-1.7b

# 4B. CKD: 23 GB, 2.2 hours. Sim-RL: 52 GB, 7.0 hours
torchrun --nproc-per-node 8 --shutdown-timeout 3600 -- star.py ckd --teacher models/Teacher-8B --student models/Qwen3-4B \
    --data rollouts.jsonl --think on --max-response-tokens 2048 --gradient-checkpointing --micro-batch-tokens 8192 \
    --out runs/ckd-4b
torchrun --nproc-per-node 8 --shutdown-timeout 3600 -- star.py simrl --model runs/ckd-4b/model --data train.jsonl.gz \
    --think on --gradient-checkpointing --micro-batch-tokens 8192 --max-concurrent 64 --out runs/star-4b

# Official scores: a process each, on one GPU.
python star.py bfcl --model runs/star-0.6b/model --think on --max-concurrent 8 \
    --categories non_live live multi_turn --out bfcl/star-0.6b
