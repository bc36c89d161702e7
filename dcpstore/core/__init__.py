"""What every room may use: ids, digests, refs, durations, caches, threads and progress."""
