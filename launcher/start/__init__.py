"""What starts runs: train, sweep, retrain, and the forecast of one."""
