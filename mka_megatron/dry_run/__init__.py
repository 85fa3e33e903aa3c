"""One rank of a large world in one process: a fake process group, tensors without data, the real model and engine."""
