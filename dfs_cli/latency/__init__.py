"""What inference costs on the clock."""
