"""Small residual networks, registered with timm, and functions that find and load any model."""
