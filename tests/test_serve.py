"""`star.py serve`: what OpenAI's client, plain sockets and floods get. The bundled teacher answers."""
import http.client
import io
import json
import re
import shutil
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import star
from apps import serve
from apps.engine import HTTPError, Job, PrefixCache
from data import InputError, tiny
from data.chat import Chat
from data.groups import Response
from data.records import read_records
from model import Transformer
from sampler import Request, generate

TINY = Path(tiny.__file__).parent
FLAGS = ("serve --think off --dtype float32 --device cpu --port 0 --max-new-tokens 64 --max-prompt-tokens 400 "
         "--max-concurrent 8 --max-waiting 200")


def start(*flags, run=True):
    """A server that listens, and answers in another thread. run=False: its engine waits for `step` to be called."""
    args, _ = star.parse([*FLAGS.split(), "--model", str(TINY / "teacher"), *flags])
    server = serve.make_server(args)
    if run:
        threading.Thread(target=server.engine.run, daemon=True).start()
    return server


@pytest.fixture(scope="module")
def server():
    server = start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def records():
    return read_records(TINY / "values.jsonl.gz")[:40]


@pytest.fixture(scope="module")
def greedy(records):
    """{record id: (prompt without its think opening, text)} of `generate`, without the end token."""
    chat = Chat.from_pretrained(TINY / "teacher")
    model = Transformer.from_pretrained(TINY / "teacher")
    requests = [Request(chat.encode(chat.prompt(r)), 1, 0, 0.0, 64, number=i) for i, r in enumerate(records)]
    texts = {}
    for request in generate(model, requests, 16, chat):
        record = records[request.number]
        ids = [i for i in request.responses[0].ids if i not in chat.stop_ids]
        texts[record["id"]] = (chat.prompt(record).removesuffix(serve.THINK["off"]), chat.decode(ids))
    return texts


def post(server, path, body, timeout=60):
    """(status, parsed reply)"""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=timeout)
    connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body))
    reply = connection.getresponse()
    content = json.loads(reply.read())
    connection.close()
    return reply.status, content


def complete(server, prompt, **options):
    status, reply = post(server, "/v1/completions", {"prompt": prompt, "temperature": 0.0, "max_tokens": 64} | options)
    assert status == 200, reply
    return reply["choices"][0]["text"]


def test_greedy_text_is_that_of_generate(server, records, greedy):
    """40 requests at once, twice: prompts of the second round are known as a whole."""
    before = server.engine.describe()
    for _ in range(2):
        with ThreadPoolExecutor(20) as pool:
            texts = list(pool.map(lambda record: complete(server, greedy[record["id"]][0]), records))
        assert texts == [greedy[record["id"]][1] for record in records]
    stats = {name: value - before[name] for name, value in server.engine.describe().items()}
    assert stats["prompt_tokens_loaded"] > stats["prompt_tokens_computed"] > 0
    assert stats["failures"] == 0 and stats["cut"] == 0


def test_answers_to_64_clients_at_once_are_those_to_one(server, records, greedy):
    """Greedy and sampled, some by streams."""
    bodies = [{"prompt": greedy[records[i % 40]["id"]][0], "temperature": i % 2, "seed": i, "max_tokens": 16 + i % 3,
               "stream": i % 4 == 3} for i in range(64)]

    def ask(body):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps(body))
        content = connection.getresponse().read().decode()
        connection.close()
        events = re.findall(r"^data: (\{.*)$", content, re.M) if body["stream"] else [content]
        return "".join(json.loads(event)["choices"][0]["text"] for event in events)

    alone = list(map(ask, bodies))
    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(ask, bodies)) == alone
    assert len(set(alone)) > 40


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_curl(server, records, greedy):
    prompt, text = greedy[records[0]["id"]]
    url = f"http://127.0.0.1:{server.server_port}/v1/completions"
    for body, status in (({"prompt": prompt, "temperature": 0}, "200"), ({"prompt": 3}, "400")):
        command = ["curl", "-sS", "--noproxy", "*", "-w", r"\n%{http_code}", url, "-d", json.dumps(body)]
        content, code = subprocess.run(command, capture_output=True, text=True, check=True).stdout.rsplit("\n", 1)
        assert code == status
        reply = json.loads(content)
        assert reply["choices"][0]["text"] == text if status == "200" else "prompt must" in reply["error"]["message"]


def test_prompts_with_a_common_beginning_compute_the_rest_only():
    """Same logits as without the store: texts are equal, at temperature 1 too; forgotten prompts are computed anew."""
    r = np.random.default_rng(0)
    texts = {}
    shared = "<|im_start|>user\n" + " ".join(map(str, range(100)))
    prompts = [f"{shared} {i}<|im_end|>\n{serve.reward.HEADER}" for i in r.integers(0, 9, 12)]
    for tokens in ("0", "100000", "300"):
        server = start("--prefix-tokens", tokens)
        texts[tokens] = [complete(server, prompt, temperature=1.0, seed=3) for prompt in prompts]
        stats = server.engine.describe()
        entries = server.engine.sampler.prefixes.entries
        assert sum(len(ids) for ids, _ in entries) <= int(tokens)
        share = stats["prompt_tokens_loaded"] / (stats["prompt_tokens_loaded"] + stats["prompt_tokens_computed"])
        assert share == 0 if tokens == "0" else share > 0.8
        server.shutdown()
        server.server_close()
    assert texts["0"] == texts["100000"] == texts["300"]


def step_and_wait(engine, step):
    """A step of the engine. Waits until the streams have taken its tokens, so that none sends several at once."""
    step()
    while any(job.stream and job.news.is_set() and not job.disconnected for job in list(engine.jobs.values())):
        time.sleep(0.001)


def test_the_openai_client(server, records, monkeypatch):
    openai = pytest.importorskip("openai", reason="the client is optional: pip install openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="none", max_retries=0)
    assert client.models.list().data[0].id == "teacher"
    record = next(r for r in records if len(r["answer"]["tool_calls"]) == 1)
    tools = [{"type": "function", "function": tool} for tool in record["tools"]]
    ask = {"model": "any", "messages": record["messages"], "tools": tools, "temperature": 0}
    reply = client.chat.completions.create(**ask)
    choice = reply.choices[0]
    call = choice.message.tool_calls[0].function
    assert {"name": call.name, "arguments": json.loads(call.arguments)} == record["answer"]["tool_calls"][0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant", None]
    last = chunks.pop()
    assert last.choices == [] and last.usage == reply.usage
    assert chunks[-1].choices[0].delta.tool_calls[0].function.arguments == call.arguments
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    # The result of the call, as a client sends it back.
    messages = [*record["messages"], choice.message, {"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": "done"}]
    assert client.chat.completions.create(**ask | {"messages": messages}).usage.prompt_tokens > 80
    hello = {"model": "any", "messages": [{"role": "user", "content": "Hello!"}], "tools": tools, "temperature": 0}
    whole = client.chat.completions.create(**hello).choices[0].message
    monkeypatch.setattr(server.engine, "step", partial(step_and_wait, server.engine, server.engine.step))
    parts = [c.choices[0].delta.content or "" for c in client.chat.completions.create(**hello, stream=True)]
    assert "".join(parts).strip("\n") == whole.content and len(parts) > 3 and not whole.tool_calls
    two = client.completions.create(model="any", prompt="a", n=2, seed=5, max_tokens=8)
    again = client.completions.create(model="any", prompt="a", n=2, seed=5, max_tokens=8)
    assert [c.text for c in two.choices] == [c.text for c in again.choices] and two.choices[0].text != two.choices[1].text
    with pytest.raises(openai.BadRequestError, match="temperature is -1"):
        client.completions.create(model="any", prompt="a", temperature=-1)


def test_a_chat_is_that_of_star_py_chat(server, records, tmp_path, monkeypatch, capsys):
    """Two turns: a request that is answered in text, and another one after it."""
    tools = records[0]["tools"]
    (tmp_path / "tools.json").write_text(json.dumps(tools))
    texts = ["Hello!", "Thank you."]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{text}\n" for text in texts)))
    flags = f"--think off --tools {tmp_path}/tools.json --dtype float32 --device cpu --max-new-tokens 64"
    assert star.main(["chat", "--model", str(TINY / "teacher"), *flags.split()]) == 0
    said = [turn.strip() for turn in capsys.readouterr().out.split("you> ")[1:3]]
    messages = []
    for text, answer in zip(texts, said, strict=True):
        messages.append({"role": "user", "content": text})
        body = {"messages": messages, "tools": tools, "temperature": 0, "max_tokens": 64}
        status, reply = post(server, "/v1/chat/completions", body)
        message = reply["choices"][0]["message"]
        assert status == 200 and message["content"] == answer
        messages.append(message)


def test_a_body_of_a_megabyte_is_read(server, records, greedy):
    prompt, text = greedy[records[0]["id"]]
    assert complete(server, prompt, user="a" * 1_000_000) == text


def test_reasoning_is_apart():
    text = "<think>\nwhy\n</think>\n\nSo.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>"
    message = serve.read_answer(text, "on")
    assert message["reasoning_content"] == "why" and message["content"] == "So."
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert serve.read_answer("never closed", "on") == {
        "role": "assistant", "content": "", "reasoning_content": "never closed"}
    assert serve.read_answer("<tool_call>{</tool_call>", "off")["content"] == "<tool_call>{</tool_call>"


def test_stop_strings_and_lengths(server, records, greedy):
    prompt, text = next(greedy[r["id"]] for r in records if r["answer"]["tool_calls"])
    assert complete(server, prompt, stop=['"arguments"']) == text.partition('"arguments"')[0]
    status, reply = post(server, "/v1/completions", {"prompt": prompt, "temperature": 0, "max_tokens": 3})
    assert reply["choices"][0]["finish_reason"] == "length" and reply["usage"]["completion_tokens"] == 3


BAD = [
    (b"{", 400, "not JSON"), (b"[]", 400, "JSON object"), ({}, 400, "prompt must"), ({"prompt": ""}, 400, "0 tokens"),
    ({"prompt": "a " * 1000}, 400, "tokens; it must"), ({"prompt": "a", "temperature": "hot"}, 400, "temperature"),
    ({"prompt": "a", "n": 1000}, 400, "n is"), ({"prompt": "a", "n": 2.5}, 400, "n is"),
    ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens"), ({"prompt": "a", "stop": [""]}, 400, "stop"),
    ({"prompt": "a", "top_p": float("nan")}, 400, "top_p"), ({"prompt": "a", "stop": "\ud800"}, 400, "Unicode"),
    ({"prompt": "\ud800"}, 400, "Unicode"), (b"[" * 100_000, 400, "not JSON"),
    (b" " * (serve.MAX_BODY + 1), 413, "bytes"),
]


@pytest.mark.parametrize("body, status, message", BAD, ids=range(len(BAD)))
def test_bad_requests_are_errors(server, capsys, body, status, message):
    failures = server.engine.counts["failures"]
    try:
        got, reply = post(server, "/v1/completions", body)
        assert got == status and message in reply["error"]["message"] and "choices" not in reply
    except (ConnectionError, BrokenPipeError):  # a body that is not read to its end
        assert status == 413
    assert server.engine.counts["failures"] == failures + 1


@pytest.mark.parametrize("body", [{}, {"messages": []}, {"messages": [{"role": "robot", "content": "a"}]},
                                  {"messages": "hello"}, {"messages": [{"role": "user", "content": "a"}], "tools": 3},
                                  {"messages": [{"role": "assistant", "content": "a"}]},
                                  {"messages": [{"role": "user", "content": "\ud800"}]}])
def test_bad_chats_are_errors(server, body):
    status, reply = post(server, "/v1/chat/completions", body)
    assert status == 400 and reply["error"]["message"]


@pytest.mark.parametrize("request_line, status", [
    (b"DELETE /v1/models HTTP/1.1", 501), (b"GET", 400), (b"GET /" + b"x" * 70_000 + b" HTTP/1.1", 414)])
def test_what_http_server_refuses_is_an_error_too(server, capsys, request_line, status):
    """JSON, counted and printed."""
    before = server.engine.describe()["failures"]
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as client:
        client.sendall(request_line + b"\r\n\r\n")
        reply = b"".join(iter(lambda: client.recv(65_536), b""))
    assert json.loads(reply.partition(b"\r\n\r\n")[2] or reply)["error"]["code"] == status
    assert server.engine.describe()["failures"] == before + 1
    assert f": {status}: " in capsys.readouterr().err


def test_it_serves_on_while_clients_go_away_and_dawdle(server, records, greedy):
    prompt, text = greedy[records[0]["id"]]
    sockets = []
    for i in range(30):  # some send half a request, some leave before the reply
        s = socket.create_connection(("127.0.0.1", server.server_port))
        body = json.dumps({"prompt": prompt, "max_tokens": 64, "n": 1 + 16 * (i % 5 == 0), "stream": i % 3 == 0}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        s.sendall(head + body[:5 if i % 2 else None])
        sockets.append(s)
    assert complete(server, prompt) == text
    for s in sockets:
        s.close()
    assert complete(server, prompt) == text
    for _ in range(100):
        if not server.engine.jobs:
            break
        time.sleep(0.1)
    assert not server.engine.jobs and not server.engine.sampler.busy


def test_too_many_waiting_requests_are_refused(records, greedy):
    server = start("--max-waiting", "4", "--max-concurrent", "2")
    prompt, text = greedy[records[0]["id"]]
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 64}
    with ThreadPoolExecutor(40) as pool:
        replies = list(pool.map(lambda _: post(server, "/v1/completions", body), range(40)))
    assert {status for status, _ in replies} == {200, 503}
    assert {reply["choices"][0]["text"] for status, reply in replies if status == 200} == {text}
    server.shutdown()
    server.server_close()


def test_clients_that_went_away_do_not_count_as_waiting():
    server = start("--max-waiting", "2", "--max-concurrent", "1", run=False)
    jobs = [Job(Request([1, 2], 1, 0, 0.0, 4)) for _ in range(4)]
    for job in jobs[:3]:
        server.engine.submit(job)
    with pytest.raises(HTTPError):
        server.engine.submit(jobs[3])
    jobs[1].disconnected = True
    server.engine.submit(jobs[3])
    server.server_close()


def test_a_broken_sampler_answers_with_errors(monkeypatch, capsys):
    errors = []
    monkeypatch.setattr(threading, "excepthook", lambda error: errors.append(error.exc_value))
    server = start()
    monkeypatch.setattr(server.engine.sampler, "compute", lambda *inputs: torch.zeros(-1))
    status, reply = post(server, "/v1/completions", {"prompt": "a"})
    assert status == 500 and "the sampler failed" in reply["error"]["message"]
    for _ in range(50):  # `run` ends, in `star.py serve` the whole command
        if any(isinstance(error, InputError) and "the sampler failed" in str(error) for error in errors):
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"it still runs: {errors}")
    server.shutdown()
    server.server_close()


def test_an_answer_that_cannot_be_parsed_can_be_sent_back(server):
    for text in ('<tool_call>\n{"name": "f", "argum', "<tool_call>\n[1]\n</tool_call>"):
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": text},
                    {"role": "user", "content": "b"}]
        status, reply = post(server, "/v1/chat/completions", {"messages": messages, "max_tokens": 4})
        assert status == 200, reply
        chat = server.engine.sampler.chat
        prompt = serve.read_prompt(server.engine, {"messages": messages}, True)
        assert prompt == chat.prompt({"messages": messages, "tools": []}) and text in prompt


@pytest.mark.parametrize("body", [
    {"tool_choice": "required"}, {"response_format": {"type": "json_object"}}, {"logprobs": True}, {"logprobs": 0},
    {"best_of": 2}, {"parallel_tool_calls": False}, {"top_k": 1}, {"chat_template_kwargs": {"enable_thinking": True}}])
def test_what_would_change_an_answer_is_refused(server, body):
    status, reply = post(server, "/v1/completions", {"prompt": "a"} | body)
    assert status == 400 and f"{next(iter(body))} is not supported" in reply["error"]["message"]
    harmless = {"tool_choice": "auto", "frequency_penalty": 0.0, "logprobs": None, "max_tokens": 2}
    assert post(server, "/v1/completions", {"prompt": "a"} | harmless)[0] == 200


def test_a_call_without_a_name_stays_text():
    text = '<tool_call>\n{"name": 1, "arguments": {}}\n</tool_call>'
    assert serve.read_answer(text, "none") == {"role": "assistant", "content": text}


def test_only_a_think_block_that_was_opened_ends():
    """In a stream, content must never turn into reasoning."""
    text = "The sum is 3.</think>\n\nIt is three."
    assert serve.read_answer(text, "off") == {"role": "assistant", "content": text}
    assert serve.read_answer("<think>" + text, "off")["reasoning_content"] == "The sum is 3."
    assert serve.read_answer(text, "on") == {
        "role": "assistant", "content": "It is three.", "reasoning_content": "The sum is 3."}
    assert serve.read_answer(text + "</think> So be it.", "on")["content"] == "It is three.</think> So be it."


def test_what_a_stream_has_sent_before_a_call_begins_its_content():
    text = ' Sure, wait.\n<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    sent = [serve.read_answer(text[:size], "none")["content"] for size in range(text.index("<"))]
    content = serve.read_answer(text, "none")["content"]
    assert content == sent[-1] == " Sure, wait." and all(map(content.startswith, sent))


def test_a_connection_serves_many_requests_and_an_error_says_that_it_ends_it(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    for body, closes in (({"prompt": "a"}, None), ({"prompt": "b"}, None), ({"prompt": 3}, "close")):
        connection.request("POST", "/v1/completions", json.dumps(body | {"max_tokens": 1}))
        reply = connection.getresponse()
        assert reply.getheader("Connection") == closes and reply.read()


def test_a_body_that_never_ends_is_an_error(server, monkeypatch):
    read_body = serve.Handler.read_body

    def read_impatiently(handler):
        handler.connection.settimeout(0.5)
        return read_body(handler)

    monkeypatch.setattr(serve.Handler, "read_body", read_impatiently)
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 500\r\n\r\n{")
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")


def test_the_cache_forgets_earlier_turns_of_a_conversation():
    """A turn's prompt ends in a think opening, which is not in the next one's."""
    chat = Chat.from_pretrained(TINY / "teacher", "off")
    prefixes = PrefixCache(1000)
    messages = []
    for turn in range(4):
        messages += [{"role": "user", "content": f"Turn {turn}, please."}]
        ids = chat.encode(chat.prompt({"messages": messages, "tools": []}))[:-1]
        prefixes.save(SimpleNamespace(prompts=[torch.zeros(2, 1, 1, len(ids), 1)]), 0, ids)
        assert [len(entry) for entry, _ in prefixes.entries] == [len(ids)]
        messages += [{"role": "assistant", "content": "Yes."}]


def test_a_port_in_use_is_refused_before_anything_is_loaded(server, capsys):
    flags = [*FLAGS.split(), "--model", str(TINY / "teacher"), "--port", str(server.server_port)]
    assert star.main(flags) == 2
    assert f"--port {server.server_port}: Address already in use; use another one" in capsys.readouterr().err


def test_a_stop_string_that_has_only_begun_is_not_sent(server):
    chat = server.engine.sampler.chat
    ids = chat.encode("timer one! ")
    request = Request([0], 1, 0, 0.0, 9, stop_strings=("! x",))
    for finish_reason, text in (("", "timer one"), ("length", "timer one! ")):
        response = Response(ids, (0, 0), finish_reason=finish_reason)
        assert serve.text_so_far(chat, request, response) == text
    # The last token may come while the text is read: the stop string is whole, and the response unfinished.
    ids = chat.encode("timer one\n\n")
    request = Request([0], 1, 0, 0.0, 9, stop_strings=("\n\n",))
    for finish_reason in ("", "stop"):
        assert serve.text_so_far(chat, request, Response(ids, (0, 0), finish_reason=finish_reason)) == "timer one"


def test_no_limit_of_one_name_leaves_that_of_the_other(server, greedy):
    prompt, _ = next(iter(greedy.values()))
    body = {"prompt": prompt, "max_completion_tokens": None, "max_tokens": 3}
    assert post(server, "/v1/completions", body)[1]["usage"]["completion_tokens"] <= 3


def test_a_client_that_leaves_between_two_responses_leaves_nothing(records):
    """One slot, two responses: the first is done and the second has not started."""
    server = start("--max-concurrent", "1", run=False)
    engine = server.engine
    job = Job(Request([1, 2, 3], 2, 0, 0.0, 1))
    engine.submit(job)
    engine.step()
    assert [response.finish_reason for response in job.request.responses][0] and engine.sampler.waiting
    job.disconnected = True
    engine.step()
    assert not engine.jobs and not engine.sampler.busy and not engine.sampler.prompts
    server.shutdown()
    server.server_close()


def test_queued_requests_of_clients_that_left_cost_nothing():
    server = start("--max-concurrent", "1", run=False)
    engine = server.engine
    jobs = [Job(Request([1, 2, 3 + i], 1, 0, 0.0, 4)) for i in range(3)]
    for job in jobs:
        engine.submit(job)
    for job in jobs[1:]:
        job.disconnected = True
    engine.step()
    assert list(engine.jobs) == [jobs[0].request] and not engine.sampler.requests
    server.shutdown()
    server.server_close()
