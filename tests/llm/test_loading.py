"""The frozen LLM as it may be held: narrow, quantised, checkpointed. What clients run stays as it was."""

from __future__ import annotations

import pytest
import torch
from helpers import PROMPT, gradients, served, some_examples, visiting

from fedmm.edge import frozen_modules
from fedmm.edge.prepare import collate, encode, prepare
from fedmm.link.remote import RemoteLLM
from fedmm.llm.loading import llava as load
from fedmm.llm.local import LocalLLM
from fedmm.model import SplitModel
from fedmm.serving.engine import Engine
from fedmm.serving.passes import Rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*inputs will be cast.*"),  # of bitsandbytes, in fp32
    pytest.mark.filterwarnings("ignore:.*_check_is_size.*"),
]
HELD = {"4bit": torch.uint8, "8bit": torch.int8, None: torch.bfloat16}


@pytest.mark.parametrize("load_in", [None, "8bit", "4bit"])
def test_a_narrow_llm_trains_edges_that_are_not(llava_folder, edge, load_in):
    backbone = load(path=str(llava_folder), prompt=PROMPT, dtype="bfloat16", load_in=load_in, device="cpu")
    decoder = backbone.model.model.language_model
    assert decoder.layers[0].mlp.up_proj.weight.dtype == HELD[load_in]
    frozen = frozen_modules.take(backbone.model, backbone.processor)
    assert all(t.is_floating_point() for name, t in frozen.items() if not name.startswith("file/"))
    exact = load(path=str(llava_folder), prompt=PROMPT, dtype="float32", device="cpu")
    state = edge.state()
    edge, processor = frozen_modules.build(frozen, rank=4, alpha=8.0)
    edge.load(state)
    batch = collate(encode(edge, prepare(some_examples(), processor, PROMPT)))
    local = LocalLLM(backbone.model)
    SplitModel(edge, local).answer_loss(batch).backward()
    wanted = gradients(edge)
    SplitModel(edge, local).generate(batch)  # without gradients; on some CPUs bitsandbytes then went on without them
    SplitModel(edge, local).answer_loss(batch).backward()
    assert all(torch.equal(gradient, wanted[name]) for name, gradient in gradients(edge).items())
    logits, exact_logits = SplitModel(edge, local)(batch), SplitModel(edge, LocalLLM(exact.model))(batch)
    assert logits.dtype == torch.float32
    assert 0 < (logits - exact_logits).norm() < 0.2 * exact_logits.norm()
    with served((backbone.model, backbone.processor), edge, local) as (host, _), visiting(host) as session:
        SplitModel(edge, RemoteLLM(session)).answer_loss(batch).backward()
    came = gradients(edge)
    assert all(torch.equal(came[name], wanted[name]) and came[name].dtype == torch.float32 for name in wanted)


def test_checkpointing_changes_no_bit_and_keeps_less(llava_folder, edge, items):
    """transformers turns it off in eval mode without a word, so it is the memory that is looked at."""
    batch = collate(encode(edge, items))
    found, held, said = [], [], []
    for checkpointing in (False, True):
        backbone = load(
            path=str(llava_folder), prompt=PROMPT, dtype="float32", device="cpu", checkpointing=checkpointing
        )
        llm = LocalLLM(backbone.model, checkpointing=backbone.checkpointing)
        SplitModel(edge, llm).answer_loss(batch).backward()
        found.append(gradients(edge))
        engine = Engine(llm)
        embeds, mask_BT = edge(batch)
        held.append(engine.begin(Rows(embeds.dense().detach(), mask_BT, batch.keep_BA)).graph_bytes)
        engine.close()
        said.append(SplitModel(edge, llm).generate(batch, max_tokens=6))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert torch.equal(*said) and said[0].shape[1] > 2
    assert held[1] < 0.5 * held[0]
