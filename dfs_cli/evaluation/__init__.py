"""Accuracy, cost and decisions over a dataset."""
