"""RULER v1 (Hsieh et al., 2024): 13 synthetic tasks whose length can be chosen.

The generators draw in the order of the authors' own (github.com/NVIDIA/RULER): with the same seed, tokenizer and files
they make the same samples, but for where essays are cut into sentences.
"""
