"""Preferences made on the way: prompts are answered by the policy, a judge compares the answers, pairs are formed."""
