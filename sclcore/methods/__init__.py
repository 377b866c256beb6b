"""Ways to a sparse network, one file each; docs/adding_a_method.md adds one.

from sclcore import connection_groups
from sclcore.driver.optimizer import Driver
from sclcore.methods.magnitude import Magnitude

optimizer = Driver(Magnitude(density=0.1), connection_groups(model), lr=0.1)
"""
