"""Freezing after tuning: weights as integer codes, integer biases, folded batch-norm."""
