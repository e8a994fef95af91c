"""The reward beside the same function written on `rouge_score`, in pairs: python tests/bench_reward.py

Both score the 3,000 committed golden rows, and 300 longer text replies; the only difference is which ROUGE-L is called.
"""
import gzip
import json
import random
import statistics
import sys
import time
from pathlib import Path

from rouge_score.rouge_scorer import RougeScorer

sys.path.insert(0, str(Path(__file__).parents[1]))
import reward  # noqa: E402

SCORER, OURS = RougeScorer(["rougeL"], use_stemmer=True), reward.rouge_l
ROWS = [json.loads(line) for line in gzip.open(Path(__file__).with_name("reward_golden.jsonl.gz"))]


def theirs(text, gold):
    return 1.0 if text == gold else SCORER.score(gold, text)["rougeL"].fmeasure


def seconds(rouge_l, rows):
    reward.rouge_l = rouge_l
    began = time.perf_counter()
    total = sum(reward.score(r["prompt"] + r["generation"], r["label"], reward.tools_in(r["prompt"]))["reward"]
                for r in rows)
    return time.perf_counter() - began, total


r = random.Random(0)
vocabulary = sorted({word for row in ROWS for word in reward.words(row["generation"])})
prose = [" ".join(r.choices(vocabulary, k=r.randrange(40, 120))) for _ in range(301)]
texts = [{"prompt": "", "generation": f"<think></think>{a}", "label": f"</think>{b}"} for a, b in zip(prose, prose[1:])]
for name, rows in (("3,000 golden rows", ROWS), ("300 text replies of 40 to 120 words", texts)):
    pairs = []
    for _ in range(7):
        (mine, total), (other, same) = seconds(OURS, rows), seconds(theirs, rows)
        assert abs(total - same) < 1e-6
        pairs.append((mine, other, other / mine))
    mine, other, ratio = (statistics.median(column) for column in zip(*pairs))
    print(f"{name:36s}  reward.py {mine / len(rows) * 1e6:7.0f} us a row   on rouge_score {other / len(rows) * 1e6:7.0f} us"
          f"   ratio {ratio:.1f}  ({min(p[2] for p in pairs):.1f} to {max(p[2] for p in pairs):.1f}, 7 pairs)")
