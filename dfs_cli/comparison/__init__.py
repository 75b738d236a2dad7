"""Dynamic networks compared with baselines at equal cost."""
