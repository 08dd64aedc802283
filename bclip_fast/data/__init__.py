"""Training data: shards, sampler, loaders, transforms, storage."""
