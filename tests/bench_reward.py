"""The reward beside the same function written on `rouge_score`, in pairs: python tests/bench_reward.py [ROLLOUTS ...]

Both score the 3,000 committed golden rows, 300 text replies, and the responses of the rollout files that are named; the
only difference is which ROUGE-L is called.
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


def seconds(rouge_l, rows, think):
    reward.rouge_l = rouge_l
    began = time.perf_counter()
    total = sum(reward.score(text, label, tools, think)["reward"] for text, label, tools in rows)
    return time.perf_counter() - began, total


r = random.Random(0)
vocabulary = sorted({word for row in ROWS for word in reward.words(row["generation"])})
prose = [" ".join(r.choices(vocabulary, k=r.randrange(40, 120))) for _ in range(301)]
work = {"golden rows": ([(row["prompt"] + row["generation"], row["label"], reward.tools_in(row["prompt"]))
                         for row in ROWS], "on"),
        "text replies of 40 to 120 words": ([(a, b, []) for a, b in zip(prose, prose[1:])], "none")}
for path in sys.argv[1:]:
    work[Path(path).name] = [], "none"
    for record in map(json.loads, open(path, encoding="utf-8")):
        answer = record["answer"]
        label = answer["content"] or "\n".join(f"<tool_call>{json.dumps(c)}</tool_call>" for c in answer["tool_calls"])
        work[Path(path).name][0].extend((r["text"], label, record["tools"]) for r in record["responses"])
for name, (rows, think) in work.items():
    pairs = []
    for _ in range(7):
        (mine, total), (other, same) = seconds(OURS, rows, think), seconds(theirs, rows, think)
        assert abs(total - same) < 1e-6
        pairs.append((mine, other, other / mine))
    mine, other, ratio = (statistics.median(column) for column in zip(*pairs))
    print(f"{len(rows):5,} {name:32s}  reward.py {mine / len(rows) * 1e6:6.0f} us each   on rouge_score "
          f"{other / len(rows) * 1e6:6.0f} us   ratio {ratio:.1f} ({min(p[2] for p in pairs):.1f} to "
          f"{max(p[2] for p in pairs):.1f})")
