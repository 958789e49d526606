"""Experiments: settings compared on the same prompts and noise, with intervals."""
