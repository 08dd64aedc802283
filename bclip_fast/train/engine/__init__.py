"""The engines that average gradients, step and shard: DDP and DeepSpeed ZeRO."""
