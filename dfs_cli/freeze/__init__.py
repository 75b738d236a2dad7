"""Freezing after tuning: weights as integer codes, folded batch-norm."""
