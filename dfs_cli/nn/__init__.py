"""What runs: quantizers, fractional layers, gates and the dynamic network."""
