"""The only rooms that know TRL."""
