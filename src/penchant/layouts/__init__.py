"""Layouts: how pairs are laid out for one forward pass."""
