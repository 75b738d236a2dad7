"""Small residual networks of our own, registered with timm, and the way to find and load any model."""
