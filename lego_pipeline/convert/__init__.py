"""Checkpoints of the released LEGO brought into this package's layout: weights are renamed, never retrained."""
