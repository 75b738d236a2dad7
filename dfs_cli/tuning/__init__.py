"""Tuning gates, quantizers and backbone towards a budget, and calibrating the operating point."""
