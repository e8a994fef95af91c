"""The bundled world: its text (tools, phrases), its records (world), its tokenizer. See README.md."""
