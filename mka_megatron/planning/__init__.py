"""What a run needs: FLOPs, memory, traffic and time, by formula; nothing is built."""
