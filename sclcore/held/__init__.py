"""What one process holds of the connections, and what ranks tell each other of theirs."""
