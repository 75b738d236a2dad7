"""Images: datasets and loaders on top of timm's readers and transforms, and the embedded dataset."""
