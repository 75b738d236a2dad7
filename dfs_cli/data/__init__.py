"""Images: on top of timm's readers and transforms, and the embedded dataset."""
