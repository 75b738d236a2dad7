"""What runs: quantizers, fractional layers and the dynamic network."""
