"""Tables, plots, Markdown and JSON from plain records."""
