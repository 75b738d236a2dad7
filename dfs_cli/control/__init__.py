"""What decides: a static policy, gates before every block, or a cheap first pass."""
