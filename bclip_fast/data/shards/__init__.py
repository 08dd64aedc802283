"""WebDataset shards with an index of their own: format, reader, writer."""
