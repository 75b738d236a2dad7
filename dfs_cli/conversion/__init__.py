"""One way through a conversion: defaults, setup, stages."""
