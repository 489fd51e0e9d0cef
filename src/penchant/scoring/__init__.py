"""Scoring: policy and reference log-probabilities of pairs."""
