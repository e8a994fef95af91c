"""A conversation with a model in the terminal: whoever types is the user, and the tool wherever one is called."""


def talk(model, chat, tools, system=None, max_new_tokens=512, temperature=0.0, top_p=1.0, seed=42):
    """Answer what is typed, token by token as they come, until an empty line, Ctrl-D or Ctrl-C.

    model: a Transformer, in the precision to sample with · chat: its Chat · tools: a list as in records · system: the
    system message, default the template's own · seed: of all draws; the others as in `simrl.generate`. What is typed
    after a reply with a <tool_call> is that tool's result. Ctrl-C within a reply is the caller's KeyboardInterrupt.
    """
    import torch

    import simrl  # here, so that `data` needs no model
    generator = torch.Generator().manual_seed(seed)
    messages = [{"role": "system", "content": system}] if system else []
    asked = "you> "
    while True:
        try:
            text = input(asked)
        except (EOFError, KeyboardInterrupt):
            text = ""
        if not text:
            print()
            return
        messages.append({"role": "tool" if asked.startswith("tool") else "user", "content": text})
        prompt = chat.encode(chat.prompt({"messages": messages, "tools": tools}))
        so_far, printed = [], 0

        def show(came):
            nonlocal printed
            so_far.extend(came.values())
            text = chat.decode([t for t in so_far if t not in chat.stop_ids])
            if not text.endswith("\ufffd"):  # half a character: wait for the rest
                print(text[printed:], end="", flush=True)
                printed = len(text)

        simrl.generate(model, [prompt], 1, max_new_tokens, chat.stop_ids, generator, temperature, top_p,
                       chat.vocab_size, each_step=show)
        print()
        reply = chat.decode([t for t in so_far if t not in chat.stop_ids])
        messages.append({"role": "assistant", "content": ("<think>" if chat.think == "on" else "") + reply})
        asked = "tool result> " if "<tool_call>" in reply else "you> "
