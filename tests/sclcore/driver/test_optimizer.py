"""What the optimizer around a method tells it of the network."""

from __future__ import annotations

import torch

from sclcore import connection_groups
from sclcore.driver.optimizer import Driver
from sclcore.methods.magnitude import Magnitude
from tests.sclcore.nets import Mixed


def test_a_method_sees_every_parameter_by_its_name() -> None:
    model = Mixed()
    driver = Driver(Magnitude(density=0.5), connection_groups(model), lr=0.1)
    with torch.no_grad():
        tensors, others = driver.tensors, driver.others
    assert {each.name: each.param for each in (*tensors, *others)} == dict(model.named_parameters())
    assert {each.name for each in tensors if each.transposed} == {"up.weight"}
    assert driver.connection_names == {each.name for each in tensors}
    [first, *_] = others
    first.state["kept"] = 3
    assert driver.others[0].state["kept"] == 3
