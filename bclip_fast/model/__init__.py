"""The two towers, their tokenizer, and the key maps of checkpoints."""
