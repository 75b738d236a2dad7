"""What a decision costs: multiply-accumulates, weighted by bits."""
