"""From a timm model to a dynamic network."""
