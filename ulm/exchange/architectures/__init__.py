"""Stock architectures of transformers, a file each."""
