"""`star.py chat`: a conversation with a model in the terminal. You play the user and the tools."""
import sys

import torch

from data import InputError
from data.chat import Chat, add_prompt_flags
from data.records import read_tools
from model import Transformer
from sampler import Request, Sampler, add_length_flag, add_sampling_flags
from train import add_machine_flags, pick_device


def chat_flags(parser):
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--tools", metavar="FILE", help="JSON list of tools")
    parser.add_argument("--system", help="system message; default: the model's own")
    add_prompt_flags(parser, "--tools-form")
    add_length_flag(parser)
    add_sampling_flags(parser, temperature=0.0)
    add_machine_flags(parser, "weights and compute")


def run_chat(args):
    """Talk to a model. If it calls a tool, type the tool's result."""
    chat = Chat.from_pretrained(args.model, args.think, args.tools_form)
    tools = read_tools(args.tools) if args.tools else []
    model = Transformer.from_pretrained(args.model, getattr(torch, args.dtype), pick_device(args))
    what = f"{len(tools)} tools" if tools else "no tools (give --tools FILE)"
    print(f"{args.model} with {what}. An empty line or Ctrl-D ends.")
    messages = [{"role": "system", "content": args.system}] if args.system else []
    role = "user"
    while text := read_input("tool result> " if role == "tool" else "you> "):
        messages.append({"role": role, "content": text})
        prompt = chat.encode(chat.prompt({"messages": messages, "tools": tools}))
        request = Request(prompt, 1, args.seed + len(messages), args.temperature, args.max_new_tokens, args.top_p)
        reply = print_reply(model, chat, request)
        answer = reply.partition("</think>")[2] if chat.think == "on" else reply
        role = "tool" if "<tool_call>" in answer else "user"
        opened = "<think>" if chat.think == "on" else ""  # the prompt ends in the opening tag
        messages.append({"role": "assistant", "content": opened + reply})
    print()


def read_input(prompt):
    """A line from the terminal; "" for Ctrl-D or Ctrl-C."""
    try:
        return input(prompt).encode(errors="replace").decode()  # half a surrogate pair is no text
    except UnicodeDecodeError as e:
        name = sys.stdin.encoding
        raise InputError(f"the terminal's text is not {name} ({e.reason}); set its encoding to UTF-8") from e
    except (EOFError, KeyboardInterrupt):
        return ""


def print_reply(model, chat, request):
    """Answer a request, printing the text as it comes. Returns it, without the end token."""
    sampler = Sampler(model, chat, 1, 1, len(request.prompt), request.max_new_tokens)
    sampler.add(request)
    printed = ""
    while sampler.busy:
        sampler.step()
        ids = request.responses[0].ids
        text = chat.decode([i for i in ids if i not in chat.stop_ids])
        shown = text.rstrip("\ufffd")  # half a character waits for the rest
        print(shown[len(printed):], end="", flush=True)
        printed = shown
    print()
    return text
