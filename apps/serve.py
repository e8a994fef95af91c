"""`star.py serve`: a model behind an OpenAI-compatible HTTP endpoint on this machine.

    GET  /v1/models, /v1/stats      the model; counts of requests, failures and tokens since the start (of one rank)
    POST /v1/completions            prompt (text) -> text
    POST /v1/chat/completions       messages, tools -> content, tool_calls, reasoning_content

All requests share one decoding batch (apps/engine.py). Under torchrun each rank holds the whole model, on a GPU of its
own, and all listen on the same port: the kernel chooses a rank for each connection (Linux only).

A completion's prompt that ends in an assistant header gets the model's think opening (--think), as in training.
Official benchmark tools send prompts without it. Nothing that a model writes is executed here.

Whatever fails is an HTTP error, counted and printed. It is never an answer: a benchmark that records an error as the
answer then scores it, and even counts it as right where no call is expected.
"""
import json
import os
import select
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

import reward
from apps.engine import Engine, HTTPError, Job, PrefixCache
from data import InputError, natural, number, parse_json, positive
from data.chat import THINK, Chat, add_prompt_flags
from data.records import read_record
from model import Transformer
from sampler import Request, Sampler, add_length_flag, describe_cache
from shard import rank, world_size
from train import add_machine_flags, fail_together, note, pick_device

MAX_BODY = 8_000_000  # bytes
MAX_CONNECTIONS = 1_000  # open at a time; more are closed at once

# Parameters that would change an answer, and the values with which they do not.
UNSUPPORTED = {
    "tool_choice": ("auto",), "functions": ([],), "function_call": (), "response_format": ({"type": "text"},),
    "logprobs": (False,), "logit_bias": ({},), "echo": (False,), "suffix": ("",), "best_of": (1,),
    "frequency_penalty": (0, 0.0), "presence_penalty": (0, 0.0), "parallel_tool_calls": (True,), "top_k": (-1, 0),
    "min_p": (0, 0.0), "repetition_penalty": (1, 1.0), "top_logprobs": (0,), "chat_template_kwargs": ({},),
    "reasoning_effort": (), "stop_token_ids": ([],), "min_tokens": (0,), "ignore_eos": (False,), "guided_json": ()}


def serve_flags(parser):
    add = parser.add_argument
    add("--model", required=True, help="model folder")
    add("--port", type=number(int, 0, 65_535), default=8000, help="port on 127.0.0.1; no other address is served")
    add("--max-concurrent", type=positive, default=16, metavar="N", help="sequences generated concurrently")
    add("--max-waiting", type=positive, default=1024, metavar="N", help="responses that may wait; more get HTTP 503")
    add("--max-prompt-tokens", type=positive, default=8192, metavar="N", help="longer prompts get HTTP 400")
    add("--prefix-tokens", type=natural, default=65_536, metavar="N",
        help="tokens of earlier prompts whose keys are kept; 0: every prompt is computed whole")
    add_length_flag(parser)
    add_prompt_flags(parser)
    add_machine_flags(parser, "weights and compute")


def run_serve(args):
    """Serve a model to OpenAI clients on this machine, until Ctrl-C. A request without a temperature has 1. Under
    `torchrun` each rank holds the whole model, and all share the port. Not yet run on a GPU."""
    server = make_server(args)
    chat = server.engine.sampler.chat
    url = f"http://127.0.0.1:{server.server_port}/v1"
    if rank() == 0:
        print(f"{args.model} at {url} with --think {chat.think}; Ctrl-C ends", flush=True)
    try:
        server.engine.run()
    except KeyboardInterrupt:
        print(json.dumps(server.engine.describe()))


def make_server(args):
    """A server that listens. `server.engine.run()` answers its clients."""
    device = pick_device(args)
    with fail_together():
        if rank() == 0:
            check_port(args.port)
    with fail_together():
        chat = Chat.from_pretrained(args.model, args.think, args.tools)
        model = Transformer.from_pretrained(args.model, getattr(torch, args.dtype), device)
        size = (args.max_concurrent, args.max_concurrent, args.max_prompt_tokens, args.max_new_tokens)
        note(f"{describe_cache(model, *size)}; up to {args.prefix_tokens:,} tokens of earlier prompts are kept, too")
        Server.allow_reuse_port = world_size() > 1
        server = Server(("127.0.0.1", args.port), Handler)
        server.engine = Engine(Sampler(model, chat, *size, PrefixCache(args.prefix_tokens)), args)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def check_port(port):
    """InputError if another server has the port, which ranks could share with it unnoticed."""
    if world_size() > 1 and port == 0:
        raise InputError("--port 0: several ranks share a port; give its number")
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as e:
        raise InputError(f"--port {port}: {os.strerror(e.errno)}; use another one") from e


# ---- From a body to a request, and from responses to a reply

def read_number(body, name, default, low, high, kind=float):
    value = body.get(name)
    if value is None:
        return default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or kind(value) != value:
        raise HTTPError(400, f"{name} is {str(value)[:40]}; it must be a number from {low} to {high}")
    return kind(value)


def read_prompt(engine, body, chatting):
    """The text of a body's prompt, up to the think opening."""
    chat = engine.sampler.chat
    if chatting:
        messages = {name: body.get(name) for name in ("messages", "tools")}
        record = read_record(messages, "", False, as_text=True)
        if "answer" in record:
            raise HTTPError(400, "the last message is the assistant's; it must be the user's or a tool's")
        return chat.prompt(record)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise HTTPError(400, "prompt must be one string")
    return prompt + THINK[chat.think] if prompt.endswith(reward.HEADER) else prompt


def read_request(engine, body, chatting, number):
    """The `Request` of a body. number: of the HTTP request, which seeds those without a seed."""
    args = engine.args
    for name, harmless in UNSUPPORTED.items():
        if body.get(name) is not None and json.dumps(body[name]) not in map(json.dumps, harmless):  # 0 is not False
            raise HTTPError(400, f"{name} is not supported; leave it out")
    if not isinstance(body.get("stream"), bool | None):
        raise HTTPError(400, "stream must be true or false")
    ids = engine.sampler.chat.encode(read_prompt(engine, body, chatting))
    if not 0 < len(ids) <= args.max_prompt_tokens:
        raise HTTPError(400, f"the prompt has {len(ids)} tokens; it must have 1 to {args.max_prompt_tokens}")
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > 16 or not all(isinstance(s, str) and 0 < len(s) <= 200 for s in stop):
        raise HTTPError(400, "stop must be a string or a list of up to 16 strings of 1 to 200 characters")
    length = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    length = read_number(body, length, args.max_new_tokens, 1, 10 ** 9, int)
    return Request(
        ids, read_number(body, "n", 1, 1, min(128, args.max_waiting), int),
        read_number(body, "seed", args.seed + number, -2 ** 63, 2 ** 63 - 1, int) % 2 ** 63,
        read_number(body, "temperature", 1.0, 0, 100), min(length, args.max_new_tokens),
        read_number(body, "top_p", 1.0, 1e-6, 1), tuple(stop))


def text_so_far(chat, request, response):
    """A response's text without the end token, cut before a stop string; until the response has ended, also before what
    may become one, and before half a character."""
    finished = response.finish_reason  # read first: the last token may come meanwhile
    text = chat.decode([i for i in response.ids if i not in chat.stop_ids])
    for string in request.stop_strings:
        text = text.partition(string)[0]
    if not finished:
        text = text.rstrip("\ufffd")
        beginnings = [string[:size] for string in request.stop_strings for size in range(1, len(string))]
        text = text[:len(text) - max([len(part) for part in beginnings if text.endswith(part)], default=0)]
    return text


def read_answer(text, think):
    """A chat message from a response's text: content, reasoning_content, tool_calls as OpenAI's clients read them."""
    reasoning, answer = "", text
    if think == "on" or text.lstrip().startswith("<think>"):
        # The first one, unlike reward.py: in a stream, content that was sent must not turn into reasoning.
        reasoning, _, answer = text.partition("</think>")
    message = {"role": "assistant", "content": answer.strip("\n")}
    if reasoning := reasoning.replace("<think>", "").strip("\n"):
        message["reasoning_content"] = reasoning
    try:
        calls, _ = reward.parse(answer)
    except (reward.FormatError, RecursionError):
        calls = None  # the client sees the text as it is
    if calls and all(isinstance(call["name"], str) for call in calls):
        before = answer.partition("<tool_call>")[0].strip("\n")
        message["content"] = before if before.strip() else None
        message["tool_calls"] = [
            {"index": i, "id": f"call_{time.time_ns()}_{i}", "type": "function",
             "function": {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}}
            for i, call in enumerate(calls)]
    return message


def make_choices(chat, request, chatting):
    """The `choices` of a reply."""
    choices = []
    for index, response in enumerate(request.responses):
        text = text_so_far(chat, request, response)
        choice = {"index": index, "finish_reason": response.finish_reason, "logprobs": None}
        if chatting:
            choice["message"] = read_answer(text, chat.think)
            if "tool_calls" in choice["message"] and response.finish_reason == "stop":
                choice["finish_reason"] = "tool_calls"
        else:
            choice["text"] = text
        choices.append(choice)
    return choices


# ---- HTTP

class Server(ThreadingHTTPServer):
    request_queue_size = 128

    def verify_request(self, request, client_address):
        return threading.active_count() <= MAX_CONNECTIONS

    def handle_error(self, request, client_address):
        """Ignore a client that disconnected; print anything else."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection. Every reply has a Content-Length or ends the connection."""
    protocol_version = "HTTP/1.1"
    path = ""  # until a request line is read
    streaming = False
    timeout = 60  # of the socket, in seconds
    disable_nagle_algorithm = True  # head and body are two writes: the second one would wait 40 ms for the client

    def log_message(self, *_):
        """Failures are printed by `fail`; the rest is silent."""

    def send_error(self, status, message=None, explain=None):
        """What http.server itself refuses: a request line that it cannot read, a method other than GET and POST."""
        self.fail(int(status), message or self.responses[status][0])

    def do_GET(self):
        engine = self.server.engine
        if self.path == "/v1/models":
            name = Path(engine.args.model).resolve().name
            self.reply(200, {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "star"}]})
        elif self.path == "/v1/stats":
            self.reply(200, engine.describe())
        else:
            self.fail(404, f"no {self.path} here")

    def do_POST(self):
        engine = self.server.engine
        number = engine.count(requests=1) * world_size() + rank()  # of all ranks
        job = None
        try:
            chatting = self.path == "/v1/chat/completions"
            if not chatting and self.path != "/v1/completions":
                raise HTTPError(404, f"no {self.path} here")
            try:
                body = self.read_body()
                job = Job(read_request(engine, body, chatting, number), bool(body.get("stream")))
            except (InputError, RecursionError) as error:
                raise HTTPError(400, str(error)) from error
            engine.submit(job)
            head = {"id": f"star-{number}", "created": int(time.time()), "model": str(body.get("model") or ""),
                    "object": "chat.completion" + ".chunk" * job.stream if chatting else "text_completion"}
            if job.stream:
                self.stream(job, head, chatting, body.get("stream_options"))
            else:
                self.wait(job)
                self.reply(200, head | {"choices": make_choices(engine.sampler.chat, job.request, chatting),
                                        "usage": usage(job.request)})
        except HTTPError as error:
            return self.fail(*error.args)
        except Exception as error:  # the client went away; anything else is a bug that it must hear of
            if job:
                job.disconnected = True
            if isinstance(error, OSError):
                raise
            return self.fail(500, f"{type(error).__name__}: {error}")
        counts = usage(job.request)
        cut = sum(response.finish_reason == "length" for response in job.request.responses)
        engine.count(cut=cut, prompt_tokens=counts["prompt_tokens"], completion_tokens=counts["completion_tokens"])

    def read_body(self):
        """The JSON object that the client sends."""
        try:
            size = int(self.headers.get("Content-Length", ""))
        except ValueError:
            raise HTTPError(411, "Content-Length is missing or not a number") from None
        if not 0 <= size <= MAX_BODY:
            raise HTTPError(413, f"the body has {size:,} bytes; the most is {MAX_BODY:,}")
        try:
            data = self.rfile.read(size)
        except TimeoutError:
            raise HTTPError(408, f"no more of the body's {size:,} bytes came for {self.timeout} seconds") from None
        return parse_json(data, "the body", "send one JSON object, in whole Unicode characters")

    def wait(self, job):
        """Wait until there are new tokens or the job is done. Returns whether it goes on."""
        while not job.news.wait(timeout=1):
            poll = select.poll()
            poll.register(self.connection, select.POLLIN)
            if poll.poll(0) and not self.connection.recv(1, socket.MSG_PEEK):
                raise ConnectionAbortedError("the client closed the connection")
        job.news.clear()
        if self.server.engine.error and not job.request.done:
            raise HTTPError(500, self.server.engine.error)
        return not job.request.done

    def stream(self, job, head, chatting, options):
        """Send the responses as server-sent events: text as it comes, but a chat with calls or reasoning at the end."""
        sent = [0] * job.request.n  # characters
        role = {"role": "assistant"}  # in the first event only: clients join what they get
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.streaming = True
        running = True
        while running:
            running = self.wait(job)
            choices = make_choices(self.server.engine.sampler.chat, job.request, chatting)
            for choice in choices:
                message = choice.pop("message", {})
                message.pop("role", None)
                text = message.get("content") or "" if chatting else choice["text"]
                if chatting and running and ("<" in text or not text.strip() or "reasoning_content" in message):
                    text = ""  # a call or a thought begins, or may begin
                new = text[sent[choice["index"]]:]
                sent[choice["index"]] += len(new)
                part = role | ({} if running else message) | {"content": new}
                choice |= {"delta": part} if chatting else {"text": new}
                if running:
                    choice["finish_reason"] = None
            self.send_event(head | {"choices": choices})
            role = {}
        if isinstance(options, dict) and options.get("include_usage"):
            self.send_event(head | {"choices": [], "usage": usage(job.request)})
        self.send_event("[DONE]")

    def send_event(self, data):
        text = data if isinstance(data, str) else json.dumps(data)
        self.wfile.write(f"data: {text}\n\n".encode())
        self.wfile.flush()

    def reply(self, status, data):
        content = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def fail(self, status, message):
        """An error reply. The connection ends, because the rest of the body may be unread."""
        self.server.engine.count(failures=1)
        # One write: lines of several threads must not run together.
        print(f"star.py serve: {self.path[:80]}: {status}: {message}\n", file=sys.stderr, end="", flush=True)
        self.close_connection = True
        error = {"error": {"message": message, "type": "invalid_request_error", "code": status}}
        self.send_event(error) if self.streaming else self.reply(status, error)


def usage(request):
    tokens = sum(len(response.ids) for response in request.responses)
    return {"prompt_tokens": len(request.prompt), "completion_tokens": tokens,
            "total_tokens": len(request.prompt) + tokens}
