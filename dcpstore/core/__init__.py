"""What every room may use: ids, durations, caches, threads, progress; no room of ours below."""
