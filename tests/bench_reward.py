"""The speed of reward.py beside the same reward with the ROUGE-L of `rouge_score`, in pairs.

    python tests/bench_reward.py [ROLLOUTS ...]

Scores the 3,000 golden rows, 300 text replies and the responses of the named rollout files.
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

SCORER = RougeScorer(["rougeL"], use_stemmer=True)
GOLDEN = Path(__file__).with_name("reward_golden.jsonl.gz")


def rouge_score(text, gold):
    return 1.0 if text == gold else SCORER.score(gold, text)["rougeL"].fmeasure


def golden_rows():
    """List (text, label, tools) of the golden values, and the words of their generations."""
    rows = []
    vocabulary = set()
    for row in map(json.loads, gzip.open(GOLDEN)):
        text = row["prompt"] + row["generation"]
        rows.append((text, row["label"], reward.tools_in(row["prompt"])))
        vocabulary.update(reward.words(row["generation"]))
    return rows, sorted(vocabulary)


def text_replies(vocabulary, n=300):
    """List (text, label, tools) of random replies."""
    r = random.Random(0)
    replies = [" ".join(r.choices(vocabulary, k=r.randrange(40, 120))) for _ in range(n + 1)]
    return [(text, label, []) for text, label in zip(replies, replies[1:])]


def rollout_rows(path):
    """List (text, label, tools) of the responses of a rollout file."""
    rows = []
    for record in map(json.loads, open(path, encoding="utf-8")):
        answer = record["answer"]
        calls = [f"<tool_call>{json.dumps(call)}</tool_call>" for call in answer["tool_calls"] or []]
        label = answer["content"] or "\n".join(calls)
        for response in record["responses"]:
            rows.append((response["text"], label, record["tools"]))
    return rows


def measure(rouge_l, rows, think):
    """Score all rows with a ROUGE-L. Returns (seconds, sum of the rewards)."""
    reward.rouge_l = rouge_l
    start = time.perf_counter()
    total = sum(reward.score(text, label, tools, think)["reward"] for text, label, tools in rows)
    return time.perf_counter() - start, total


def compare(name, rows, think, rouge_l=reward.rouge_l):
    """Print the median times of seven pairs of runs, in microseconds a row, and their ratio."""
    times = []
    reference_times = []
    for _ in range(7):
        seconds, total = measure(rouge_l, rows, think)
        reference_seconds, reference_total = measure(rouge_score, rows, think)
        assert abs(total - reference_total) < 1e-6
        times.append(seconds / len(rows) * 1e6)
        reference_times.append(reference_seconds / len(rows) * 1e6)
    ratios = [b / a for a, b in zip(times, reference_times)]
    print(f"{len(rows):5,} {name:32s}  reward.py {statistics.median(times):6.0f} us each   "
          f"on rouge_score {statistics.median(reference_times):6.0f} us   "
          f"ratio {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})")


rows, vocabulary = golden_rows()
compare("golden rows", rows, "on")
compare("text replies of 40 to 120 words", text_replies(vocabulary), "none")
for path in sys.argv[1:]:
    compare(Path(path).name, rollout_rows(path), "none")
