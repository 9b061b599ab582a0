"""Linen modules. Plain typed fields, no config objects, no losses, no I/O."""
