"""Captions from labels: by a language model behind an OpenAI-compatible endpoint, or from templates without one."""
