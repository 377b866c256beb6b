"""What starts runs: their first recipe, train, sweep, retrain, what one needs and would leave."""
