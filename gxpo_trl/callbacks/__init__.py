"""Callbacks for any trainer of TRL: benchmarks, trajectories, run records, trackers, Hub."""
