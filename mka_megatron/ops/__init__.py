"""Fused operations: one folder each, whose `__init__` is the contract and whose `reference` is the specification."""
