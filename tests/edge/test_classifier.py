"""The compact network and its head: every method trains it as it trains adapters, and CReFF's numbers by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedmm import seeds, tree
from fedmm.adapters.schema import fits
from fedmm.aggregate.creff import creff as merge
from fedmm.aggregate.mean import mean
from fedmm.config import composition, targets
from fedmm.data.glyphs import handwriting
from fedmm.data.scenes import Recipe, compose
from fedmm.edge import compact
from fedmm.edge.classifier import Classes, Classifier
from fedmm.edge.prepare import collate
from fedmm.evaluate.answers import answers
from fedmm.methods.creff import tell
from fedmm.model import ClassifierModel
from fedmm.train import train
from fedmm.types import Update

NAMES = [str(digit) for digit in range(10)]
PLAN = compact.resnet(depths=(1, 1), widths=(8, 16), side=16)


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    return compose("train", rng, 24, handwriting("train"), Recipe(kinds=("colour",), layouts=("one",)))


@pytest.fixture(scope="module")
def items(examples):
    return Classes(NAMES, PLAN.side).prepare(examples)


def built(sets=("shared",), retrained=False) -> Classifier:
    edge = Classifier(PLAN, len(NAMES), sets=sets, retrained=retrained)
    for name in sets:
        edge.reset(seeds.generator(0, f"test/{name}"), name)
    return edge


def test_a_trunk_has_no_state_that_would_not_travel():
    """Batch norms keep running means, which are no parameters: a server that merges the rest would lose them."""
    net = built().net()
    assert not list(net.buffers()) and not any(isinstance(part, nn.BatchNorm2d) for part in net.modules())
    assert {name.split(".")[0] for name, _ in net.named_parameters()} == {"trunk", "head"}


def test_an_image_does_not_see_its_batch(items):
    model = ClassifierModel(built())
    whole = model(collate(items[:4]))
    for i, item in enumerate(items[:4]):
        torch.testing.assert_close(model(collate([item]))[0], whole[i])


@pytest.mark.parametrize(("name", "parameters"), [("resnet8", 78_042), ("resnet50", 23_528_522)])
def test_the_networks_are_as_large_as_they_are_known_to_be(name, parameters):
    """ResNet-8 of 16, 32 and 64 channels; ResNet-50 has 25.557 million with 1,000 classes, so 23.529 with ten."""
    plan = targets.make(composition.compose([f"compact={name}"]).compact)
    net = Classifier(plan, 10).net()
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    assert net(torch.zeros(1, 3, 64, 64)).shape == (1, plan.out_width)


def test_the_start_is_a_function_of_the_generator_alone():
    torch.manual_seed(1)
    first = built().state()
    torch.manual_seed(2)
    assert tree.digest(built().state()) == tree.digest(first)
    assert all(tensor.any() or name.endswith("bias") for name, tensor in first.items())


def test_sets_that_act_together_are_averaged(items):
    edge = built(("local", "frozen"))
    model, batch = ClassifierModel(edge), collate(items[:3])
    both = model(batch, ("local", "frozen"))
    torch.testing.assert_close(both, (model(batch, ("local",)) + model(batch, ("frozen",))) / 2)


def test_it_answers_with_names(items, examples):
    classes = Classes(NAMES, PLAN.side)
    model = ClassifierModel(built())
    said = answers(model, items, classes, batch_size=5)
    assert [answer.truth for answer in said] == [example.answer for example in examples]
    assert [answer.said for answer in said] == [NAMES[i] for i in model(collate(items))[:, 0].argmax(-1)]


def test_a_class_that_is_not_there_and_an_image_too_many_are_told(examples):
    with pytest.raises(ValueError, match=r"of class .* none of the 1 at the server; set classes="):
        Classes(["nothing"], 16).prepare(examples)
    with pytest.raises(ValueError, match=r"has 0 images, head=classes takes one; set head=llm"):
        Classes(NAMES, 16).prepare([replace(examples[0], images=())])


@pytest.mark.parametrize("name", sorted({*composition.options("method")} - {"local"}))
def test_every_method_trains_it(items, name):
    cfg = composition.compose([f"method={name}", "rule=mean"])
    edge = built(tuple(cfg.method.sets), cfg.method.retrained)
    edge.freeze_all_but(targets.make(cfg.schema)(2, 2).trains)
    model, before = ClassifierModel(edge), {one: edge.state(one) for one in cfg.method.sets}
    anchor = before.get("shared", {})
    out = train(
        model,
        items,
        targets.make(cfg.method.step),
        make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        anchor=anchor,
        seed=0,
        round=2,
        rounds=2,
        client=0,
        batch_size=8,
        begin=targets.make(cfg.method.begin),
    )
    trained = "local" if name == "feddpa" else "shared"
    assert not torch.equal(before[trained]["head.weight"], edge.state(trained)["head.weight"])
    if cfg.method.fisher:
        found = targets.make(cfg.method.fisher)(model, items, out.last)
        assert found.keys() == anchor.keys() and any(tensor.any() for tensor in found.values())


def test_creffs_schema_leaves_the_servers_head_alone_and_sends_all():
    """Every name travels, so that the server has both heads and is told gradients; trunk and head alone are trained."""
    now = targets.make(composition.compose(["arm=creff", "scenario=long_tail"]).schema)(1, 2)
    edge = built(retrained=True)
    edge.freeze_all_but(now.trains)
    held = {name for name, parameter in edge.named().items() if not parameter.requires_grad}
    assert held == {"shared.retrained.weight", "shared.retrained.bias", "shared.gradients"}
    assert all(fits(name, now.sends) for name in edge.named())


# --- CReFF ------------------------------------------------------------------------------------------------------------


def test_what_a_client_tells_is_each_class_gradient(items):
    """The closed form is autograd's, class by class, and a class that the client lacks has none."""
    edge = built(retrained=True)
    own = [item for item in items if item.truth in "012"]
    tell(ClassifierModel(edge), own)
    net = edge.net()
    for label in range(10):
        mine = [item for item in own if item.answer[0] == label]
        found = net.gradients[label]
        if not mine:
            assert not found.any()
            continue
        batch = collate(mine)
        loss = F.cross_entropy(net.retrained(net(batch.pixels)), batch.labels_BA[:, 0])
        weight, bias = torch.autograd.grad(loss, [net.retrained.weight, net.retrained.bias])
        torch.testing.assert_close(found, torch.cat([weight, bias[:, None]], 1), rtol=1e-4, atol=1e-6)


def test_the_head_is_trained_for_classes_that_the_mean_has_lost():
    """Two classes, two wide: the aggregated head calls everything class 0, the retrained one tells them apart."""
    real = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    head = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    current = {
        "head.weight": head,
        "head.bias": torch.tensor([2.0, 0.0]),
        "retrained.weight": head.clone(),
        "retrained.bias": torch.tensor([2.0, 0.0]),
        "gradients": torch.zeros(2, 2, 3),
    }
    given = tree.clone(current)
    p = (real @ head.T + current["head.bias"]).softmax(-1)
    told = torch.stack([torch.outer(p[c] - torch.eye(2)[c], torch.cat([real[c], torch.ones(1)])) for c in (0, 1)])
    zero = tree.zeros_like(current)
    one = Update(0, zero | {"gradients": told * torch.tensor([1.0, 0.0])[:, None, None]}, 90)
    other = Update(1, zero | {"gradients": told * torch.tensor([0.0, 1.0])[:, None, None]}, 10)
    merged, memory = merge(current, [one, other], {}, per_class=8)
    assert (real @ merged["head.weight"].T + merged["head.bias"]).argmax(1).tolist() == [0, 0]
    assert (real @ merged["retrained.weight"].T + merged["retrained.bias"]).argmax(1).tolist() == [0, 1]
    assert not merged["gradients"].any() and memory["features"].shape == (2, 8, 2)
    assert tree.digest(current) == tree.digest(given)
    again, _ = merge(current, [other, one], {}, per_class=8)
    torch.testing.assert_close(again["retrained.weight"], merged["retrained.weight"])


def test_a_class_nobody_told_of_keeps_its_features_and_without_a_head_it_is_the_mean():
    current = {
        "head.weight": torch.eye(2), "head.bias": torch.zeros(2), "retrained.weight": torch.eye(2),
        "retrained.bias": torch.zeros(2), "gradients": torch.zeros(2, 2, 3),
    }  # fmt: skip
    features = torch.arange(8.0).view(2, 2, 2)
    told = torch.zeros(2, 2, 3)
    told[0, 0] = 1.0
    update = Update(0, tree.zeros_like(current) | {"gradients": told}, 1)
    _, memory = merge(current, [update], {"features": features}, match_steps=3)
    assert torch.equal(memory["features"][1], features[1]) and not torch.equal(memory["features"][0], features[0])
    plain = {"w": torch.zeros(3)}
    updates = [Update(k, {"w": torch.full((3,), float(k))}, k + 1) for k in range(3)]
    assert torch.equal(merge(plain, updates, {})[0]["w"], mean(plain, updates, {})[0]["w"])
