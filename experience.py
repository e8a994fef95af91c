"""What a step of Sim-RL learns from: groups of sampled and scored responses, in the order of their prompts.

Groups are used in the order of their prompts, not as they finish, which would favour short responses. The step ends
with the group that fills it; later ones are dropped, and their prompts come again in the next step. Up to rounding, the
number of slots or ranks does not change what is trained on.
"""
import math

import torch
from tqdm import tqdm

import train
from data.groups import next_prompts
from sampler import Request, Sampler, cache_size, describe_cache

STEPS_PER_EXCHANGE = 16  # decoding steps between two exchanges of finished groups, if there are several ranks


def make_sampler(policy, groups, chat, args):
    """The sampler of a run, with room for the longest prompt. If prompts are few, a step repeats them."""
    requests = [Request(group.prompt, args.n, 0, args.temperature, args.max_new_tokens)
                for group in groups]
    repeats = math.ceil(args.max_draws * args.prompts_per_step / len(groups))
    size = cache_size(args.max_concurrent, requests * repeats)
    train.note(describe_cache(policy, *size))
    return Sampler(policy, chat, *size)


def sample_step(sampler, prompts, first, score, has_signal, args, stop=lambda: False):
    """Sample and score the groups of a step, from prompt number `first` on.

    score: function (record, text) -> {"reward", "answer_score", ...}
    has_signal: function (rewards, answer scores) -> whether a group is trained on
    stop: function -> whether to stop; checked after every token (with several ranks: at every exchange, for all)

    Returns the groups that the step has used, those with a signal, and {name: seconds}; no groups if it was stopped.
    """
    seconds = {"seconds_sampling": 0.0, "seconds_scoring": 0.0, "seconds_training": 0.0}
    groups = next_prompts(prompts, args.seed, first, args.max_draws * args.prompts_per_step)
    started = 0
    used, kept = [], []  # finished groups, in the order of their prompts; those of them with a signal
    free = [sampler.num_free] * train.world_size()  # free slots of each rank

    def full():
        return len(kept) == args.prompts_per_step or len(used) == len(groups)

    while not full():
        with train.timed(seconds, "seconds_sampling"):
            # 1. Start as many prompts as are expected to fill the step, at the rate of signals so far. Each goes to
            # the rank with the most free slots, so ranks that are busy with long responses get fewer.
            groups_per_signal = (1 + len(used)) / (1 + len(kept))
            expected = len(used) + (args.prompts_per_step - len(kept)) * groups_per_signal  # groups that fill the step
            while started < min(expected, len(groups)) and max(free) > 0:
                owner = free.index(max(free))
                free[owner] -= args.n
                if owner == train.rank():
                    prompt = groups[started].prompt
                    seed = args.seed * 1_000_003 + first + started
                    sampler.add(Request(prompt, args.n, seed, args.temperature,
                                        args.max_new_tokens, number=started))
                started += 1
            # 2. Draw a token in every slot.
            finished = []
            for _ in range(STEPS_PER_EXCHANGE if train.world_size() > 1 else 1):
                finished += sampler.step()
        with train.timed(seconds, "seconds_scoring"):
            # 3. Score finished groups, and give them to all ranks.
            for request in finished:
                record = groups[request.number].record
                score_responses(request.responses, record, score, sampler.chat)
            free, stopped, done = exchange(sampler, finished, stop())
            for number, responses in done.items():
                groups[number].responses = responses
        # 4. Take finished groups in the order of their prompts; keep those with a signal.
        while not full() and groups[len(used)].responses:  # [] until it is finished
            group = groups[len(used)]
            used.append(group)
            scores = [response.answer_score for response in group.responses]
            if has_signal(group.rewards, scores):
                kept.append(group)
        if stopped and not full():
            return [], [], seconds
    sampler.clear()
    return used, kept, seconds


def score_responses(responses, record, score, chat):
    """Decode and score the responses to one record, in place."""
    for response in responses:
        response.text = chat.decode(response.ids)
        response.details = dict(score(record, response.text))
        response.reward = response.details.pop("reward")
        response.answer_score = response.details.pop("answer_score")


def exchange(sampler, finished, stop):
    """All-gather over ranks: (free slots of each rank, whether any should stop, {number: responses} of all)."""
    responses = {request.number: request.responses for request in finished}
    states = train.gather_over_ranks([(sampler.num_free, stop, responses)])
    free, stops, parts = zip(*states)
    return list(free), any(stops), dict(pair for part in parts for pair in part.items())


def answer_held_out(chat, groups, score, max_new_tokens, model):
    """`score_answers` with a sampler of its own, for `ckd` and `sft`, which have none."""
    slots = min(64, len(groups))
    longest = max(len(group.prompt) for group in groups)
    sampler = Sampler(model, chat, slots, slots, longest, max_new_tokens)
    return score_answers(sampler, groups, score, max_new_tokens)


@torch.no_grad()
def score_answers(sampler, groups, score, max_new_tokens):
    """{"valid_reward", "valid_exact"}: means over greedy answers to held-out prompts, on all ranks.

    score: as in `sample_step`; also returns "exact", see `reward.score`
    """
    sums = {"valid_reward": 0.0, "valid_exact": 0.0}
    share = groups[train.rank()::train.world_size()]
    for number, group in enumerate(share):
        sampler.add(Request(group.prompt, 1, 0, 0.0, max_new_tokens, number=number))
    with tqdm(desc="validate", total=len(share), delay=2, leave=False, disable=train.rank() > 0) as bar:
        while sampler.busy:
            for request in sampler.step():
                text = sampler.chat.decode(request.responses[0].ids)
                result = score(share[request.number].record, text)
                sums["valid_reward"] += result["reward"]
                sums["valid_exact"] += result["exact"]
                bar.update()
    sums = train.sum_over_ranks(sums)
    return {name: value / len(groups) for name, value in sums.items()}
