"""From articles and images on disk to batches: ingest, shards, order, loaders, transforms."""
