"""What a client's adapters are when it begins a round."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers import DATA, SMALL, served

from fedmm.federation.client import Order, carry_out
from fedmm.methods import feddat


@pytest.fixture
def began(monkeypatch) -> dict[str, dict[str, torch.Tensor]]:
    """Every set of a FedDAT client as it is before its first step."""
    sets: dict[str, dict[str, torch.Tensor]] = {}
    step = feddat.feddat

    @functools.wraps(step)
    def watched(model, *args, **options):
        if not sets:
            sets.update({name: model.edge.state(name) for name in ("shared", "local", "frozen")})
        return step(model, *args, **options)

    monkeypatch.setattr(feddat, "feddat", watched)
    return sets


def test_every_set_begins_as_the_state_that_arrives(llava, backbone, edge, local_llm, began):
    """The frozen copy too: it is not the one of a client's own start, nor that of an older round."""
    with served(llava, edge, local_llm) as (host, taken):
        overrides = (*backbone, *SMALL, *DATA, "arm=feddat")
        address = f"127.0.0.1:{host.port}"
        carry_out(Order(overrides, "a" * 32, 1, 0, address, host.token(1, 0), train=True, score=False))
    assert len(taken) == 1
    for name, state in began.items():
        assert state.keys() == edge.state().keys()
        assert all(torch.equal(tensor, state[key]) for key, tensor in edge.state().items()), name
