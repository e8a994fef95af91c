"""The embedded world: what can be asked (tools), records made of it (world), its tokenizer. See README.md."""
