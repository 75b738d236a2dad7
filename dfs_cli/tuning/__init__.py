"""Tuning controller, quantizers and backbone towards a budget."""
