"""What things cost on the clock, and in memory."""
