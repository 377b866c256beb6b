"""What all methods have in common: the optimizer around one, and the parts they are made of.

`method.py` is what a method says and does, `net.py` what it may ask of the `optimizer.py` around
it. `masked.py` is for those whose masks are state, `gates.py` for those with a gate on each
feature, which `units.py` finds; `bernoulli.py` draws gates, `budget_search.py` chooses among them.
`choice.py`, `budgets.py` and `schedules.py` are small functions of no method in particular.
"""
