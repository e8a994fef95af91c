# The paper's first stage: refine Qwen3-8B into the teacher, on one node of 8 GPUs of 80 GB. Not run.
# The result is published as star-lab/Teacher-8B, so most people do not need this.
# xlam.jsonl and toolace.jsonl: your records (README.md, *With real models*); valid.jsonl.gz: some of them, kept apart.
#
# 64 GB a GPU; 19 hours for 1,000 steps of up to 3,000. Computed by
#   python star.py estimate --student models/Qwen3-8B --teacher models/Qwen3-8B --gpus 8 --gradient-checkpointing \
#       --micro-batch-tokens 8192 --max-concurrent 32
python star.py prepare --data xlam.jsonl toolace.jsonl --model models/Qwen3-8B --out train.jsonl.gz
torchrun --nproc-per-node 8 --shutdown-timeout 3600 -- star.py simrl --model models/Qwen3-8B --data train.jsonl.gz \
    --valid valid.jsonl.gz --valid-limit 256 --think on --gradient-checkpointing --micro-batch-tokens 8192 \
    --max-concurrent 32 --out runs/teacher-8b
