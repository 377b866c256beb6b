"""What every optimizer with masks is made of: the rules that move weights, and what it can say."""
