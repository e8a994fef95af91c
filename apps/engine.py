"""The engine of `star.py serve`: one thread draws tokens for the requests of all clients.

    PrefixCache   the keys of earlier prompts: only the tokens after the longest cached prefix are computed. Many
                  requests share a system prompt with its tools, and a conversation sends all of its turns again
    Engine        submit(job), from any thread; the job's `news` is set when there are tokens, and when it is done
"""
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from data import InputError, one_line
from sampler import Request


OPENING = 8  # tokens of a think opening, at most


class HTTPError(Exception):
    """An error that is returned to the client. args: status, message."""


class PrefixCache:
    """Keys and values of earlier prompts, up to `max_tokens` of them; the least recently used ones go first."""

    def __init__(self, max_tokens):
        self.max_tokens = max_tokens
        self.entries = []  # (ids, [keys and values [2, Hkv, tokens, D] of a layer]), the last used one last
        self.loaded = 0
        self.computed = 0

    def load(self, cache, row, ids):
        """Copy the longest cached prefix of a prompt into its row of the cache. Returns its number of tokens."""
        ids = np.array(ids)
        shared = [common_length(known, ids) for known, _ in self.entries]
        length = max(shared, default=0)
        if length:
            entry = self.entries.pop(shared.index(length))
            self.entries.append(entry)
            for buffer, keys in zip(cache.prompts, entry[1]):
                buffer[:, row, :, :length] = keys[:, :, :length]
        self.loaded += length
        self.computed += len(ids) - length
        return length

    def save(self, cache, row, ids):
        """Keep the keys of a prompt in a row of the cache. Entries that it begins with are dropped, also if
        their last few tokens differ: the next turn of a conversation is without the think opening of this one."""
        ids = np.array(ids)
        if len(ids) > self.max_tokens or any(common_length(known, ids) == len(ids) for known, _ in self.entries):
            return
        self.entries = [entry for entry in self.entries if common_length(entry[0], ids) < len(entry[0]) - OPENING]
        while self.entries and sum(len(known) for known, _ in self.entries) + len(ids) > self.max_tokens:
            del self.entries[0]
        self.entries.append((ids, [buffer[:, row, :, :len(ids)].clone() for buffer in cache.prompts]))


def common_length(a, b):
    """How many ids two arrays have in common at their beginning."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


@dataclass(eq=False)
class Job:
    """A request of a client. `news` is set when there are new tokens (if `stream` is set), and at the end."""
    request: Request
    stream: bool = False
    disconnected: bool = False  # the client went away
    news: threading.Event = field(default_factory=threading.Event)


class Engine:
    """Draws tokens for all jobs, in the thread that calls `run`. Handlers `submit` a job and wait for its news."""

    def __init__(self, sampler, args):
        self.sampler = sampler
        self.args = args
        self.changed = threading.Condition()
        self.jobs = {}  # {request: job}
        self.error = None
        self.counts = Counter(requests=0, failures=0, cut=0, prompt_tokens=0, completion_tokens=0, seconds_sampling=0.0)

    def submit(self, job):
        """Queue a job; HTTPError if too many are waiting."""
        with self.changed:
            asked = sum(request.n for request, other in self.jobs.items() if not other.disconnected)
            waiting = max(0, asked - self.sampler.num_slots)
            if self.error or waiting + job.request.n > self.args.max_waiting:
                raise HTTPError(503, self.error or f"{waiting} responses are waiting; try again later")
            self.jobs[job.request] = job
            self.sampler.add(job.request)
            self.changed.notify()

    def run(self):
        try:
            while True:
                with self.changed:
                    self.changed.wait_for(lambda: self.sampler.busy or self.error)
                    if self.error:
                        return
                start = time.perf_counter()
                self.step()
                self.count(seconds_sampling=time.perf_counter() - start)
        except Exception as error:  # out of memory, say: every waiting client must hear of it
            traceback.print_exc()
            with self.changed:
                self.error = f"the sampler failed: {one_line(str(error))}"
                for job in self.jobs.values():
                    job.news.set()
            time.sleep(1)  # the time to tell them
            raise InputError(self.error) from error

    def close(self):
        """Let `run` return after its present step. Waiting jobs are not told."""
        with self.changed:
            self.error = self.error or "the server has ended"
            self.changed.notify()

    def step(self):
        """Drop the jobs of clients that went away, draw a token in every slot, and notify the jobs."""
        with self.changed:
            for request, job in list(self.jobs.items()):
                if job.disconnected and self.sampler.cancel(request):
                    del self.jobs[request]  # the sampler has nothing of it, so it will not return it
        for request in self.sampler.step():
            with self.changed:
                self.jobs.pop(request).news.set()
        for job in list(self.jobs.values()):
            if job.stream and job.request.responses:
                job.news.set()

    def count(self, **counts):
        """Add to the counts. Returns the number of requests so far."""
        with self.changed:
            self.counts.update(counts)
            return self.counts["requests"]

    def describe(self):
        """What /v1/stats returns."""
        prefixes = self.sampler.prefixes
        return self.counts | {"prompt_tokens_computed": prefixes.computed, "prompt_tokens_loaded": prefixes.loaded}
