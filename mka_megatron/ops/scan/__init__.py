"""L2's summaries of every document so far: the exponential moving average and the prefix mean, in PyTorch on any device.

Both reset at documents, continue carried states and pass padding by. Shapes: B batch, S slots; further axes are channels.
"""

from mka_megatron.ops.scan.rows import Rows
from mka_megatron.ops.scan.summaries import ema, prefix_mean

__all__ = ["Rows", "ema", "prefix_mean"]
