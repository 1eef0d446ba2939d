"""The two towers, the dual encoder and the named models."""
