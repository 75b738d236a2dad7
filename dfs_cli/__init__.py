"""dfs: input-adaptive ResNets by Dynamic Fractional Skipping (Shen et al., AAAI 2020).

The public names are those of ``__init__.pyi``. They are loaded on first use, so that ``dfs --help`` does not wait for torch.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
