"""WebDataset shards with an index: format, reader, writer, verification."""
