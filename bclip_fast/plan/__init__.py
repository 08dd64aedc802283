"""What a training run would take: memory, operations and hours."""
