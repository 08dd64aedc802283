"""Settings of the C library's memory allocator."""

from __future__ import annotations

from bclip_fast.io import system


def set_malloc_trim(keep: bool = True) -> None:
    """Make glibc keep freed memory for the whole process, or with `keep=False` go back to glibc's dynamic limits.

    By default glibc returns large blocks to the system at once. A training step allocates the same blocks as the step
    before, so it would pay for each page again. A step of ViT-B/16 and BERT-base at batch 16 took 200,000 page faults
    and half a second of CPU time for them.
    """
    mallopt = getattr(system.c_library(), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, (1 << 31) - 1 if keep else 64 << 20)
        # glibc before 2.34 accepts at most 32 MiB, and mallopt returns 0 for more.
        if not (keep and mallopt(mmap_threshold, 1 << 30)):
            mallopt(mmap_threshold, 32 << 20)
