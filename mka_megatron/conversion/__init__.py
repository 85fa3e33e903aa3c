"""Hugging Face directories: adding MKA to a model, taking it out again, exporting training checkpoints, comparing logits.

Weights are moved as bytes, through a few buffers: nothing here needs memory in proportion to a model, or a GPU.
"""
