"""What all methods have in common: the optimizer around one, and the parts they are made of.

`method.py` is what a method says and does, `net.py` what it may ask of the `optimizer.py` around
it, `registry.py` finds one by its name. `masked.py` is for those whose masks are state;
`choice.py`, `budgets.py` and `schedules.py` are small functions of no method in particular.
"""
