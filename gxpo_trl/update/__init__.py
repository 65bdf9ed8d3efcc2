"""The update rule: tensors and an engine, no TRL, no transformers."""
