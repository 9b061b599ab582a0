"""Host side: sources of encoded images, augmentation, block masks, batches. Numpy only."""
