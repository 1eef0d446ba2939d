"""Zero-shot tasks, metrics and reports."""
