"""The attention benchmark: the same small GPT with every variant, on the same batches, with equally many parameters.

Models, data and engine are those of training; tools/benchmark.py and tools/ablate.py are the command lines.
"""
