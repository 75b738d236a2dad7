"""The file that a conversion writes: tensors and a manifest in one safetensors file."""
