"""The two towers, their tokenizer, and their weights and configurations on disk."""
