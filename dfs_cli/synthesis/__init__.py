"""Images made from a pretrained network, where there are none."""
