"""Dynamic networks beside their rivals at equal cost."""
