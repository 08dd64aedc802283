"""Small helpers for files: atomic writes, hashes, JSON lines, progress bars, run folders."""
