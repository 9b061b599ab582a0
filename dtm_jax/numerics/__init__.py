"""XLA against PyTorch: the same training step written twice, and what comes out of both."""
