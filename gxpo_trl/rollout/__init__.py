"""One optimizer step's rollouts."""
