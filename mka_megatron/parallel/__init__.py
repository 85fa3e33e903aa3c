"""Process groups, gradient agreement over tensor-parallel ranks, and what CPU hosts need."""
