"""The memory levels: document boundaries, causal summaries, routing weights."""
