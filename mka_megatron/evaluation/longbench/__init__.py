"""LongBench v1, v1-E (Bai et al., 2024) and v2: the user's data files, the authors' prompts, truncation and metrics."""
