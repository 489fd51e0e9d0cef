"""Evaluation on held-out pairs and prompts."""
