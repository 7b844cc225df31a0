"""Health of a run: signals, heartbeat, error messages, replica checks and timing."""
