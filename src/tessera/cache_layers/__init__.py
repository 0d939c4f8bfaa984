"""The layers of a cache: which tokens of a call belong to which row, when they are written, and what queries read."""
