"""What keeps a run alive: signals, heartbeat, failures in words, equal replicas, and where the time goes."""
