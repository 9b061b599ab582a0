"""TFDS builders of this package."""
