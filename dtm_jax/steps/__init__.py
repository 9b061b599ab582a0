"""Factories of pure train steps. No iteration, no logging, no I/O."""
