"""What a server reads from the frames of an honest client: the claims of docs/SECURITY.md, each tried."""

from __future__ import annotations

import pytest
import torch
from helpers import gradients, run, served, visiting

from fedmm.edge import frozen_modules
from fedmm.edge.prepare import collate, encode
from fedmm.link import wire
from fedmm.link.remote import RemoteLLM
from fedmm.model import SplitModel
from fedmm.runs.folder import read_rows
from fedmm.types import IGNORE


@pytest.fixture
def frames(monkeypatch) -> list[wire.Frame]:
    """Every frame that either end sends."""
    sent: list[wire.Frame] = []
    encode = wire.encode

    def watched(frame):
        sent.append(frame)
        return encode(frame)

    monkeypatch.setattr(wire, "encode", watched)
    return sent


def named(frames: list[wire.Frame], name: str) -> torch.Tensor:
    """The only tensor of this name in any frame."""
    (found,) = [frame.tensors[name] for frame in frames if name in frame.tensors]
    return found


def words_in(embeds_BTD, table_VD, adapters) -> torch.Tensor:
    """The nearest token to each embedding, once the adapters that the host knows act on its token table."""
    (term,) = adapters
    table_VD = table_VD + term.scale * (table_VD @ term.down_RD.T) @ term.up_DR.T
    return torch.cdist(embeds_BTD.flatten(0, 1), table_VD).argmin(-1).view(embeds_BTD.shape[:2])


@pytest.mark.parametrize("cache", ["run", "none"])
@pytest.mark.parametrize("encoding", ["factored", "dense"])
@pytest.mark.parametrize("loss_at", ["auto", "client"])
def test_the_server_reads_every_question_and_every_answer(
    llava, edge, local_llm, items, frames, loss_at, encoding, cache
):
    """Under every setting of the link, from one training step of a client that follows the protocol."""
    batch = collate(encode(edge, items))
    with served(llava, edge, local_llm) as (host, _), visiting(host) as session:
        frames.clear()
        llm = RemoteLLM(session, encoding=encoding, cache=cache)
        SplitModel(edge, llm, loss_at).answer_loss(batch).backward()
    assert gradients(edge)

    text_BT = batch.mask_BT & ~batch.image_BT
    if encoding == "factored":
        tokens_BT = named(frames, "tokens").long()
    else:
        tokens_BT = words_in(
            named(frames, "whole.0").detach(),
            frozen_modules.build_base(frozen_modules.take(*llava))[1],
            edge.token_terms(),
        )
    assert text_BT.sum() > 15 and torch.equal(tokens_BT[text_BT], batch.tokens_BT[text_BT]), "the questions"

    asked_BA = batch.labels_BA != IGNORE
    # where the loss is the client's, the gradient is p - y, which is negative at the label alone
    labels_BA = named(frames, "labels") if loss_at == "auto" else named(frames, "grad").argmin(-1)
    assert asked_BA.any() and torch.equal(labels_BA[asked_BA], batch.labels_BA[asked_BA]), "the answers"


@pytest.mark.parametrize("encoding", ["factored", "dense"])
def test_no_pixel_is_in_any_frame_but_features_are(llava, edge, local_llm, items, frames, encoding):
    batch = collate(encode(edge, items))
    with served(llava, edge, local_llm) as (host, _), visiting(host) as session:
        frames.clear()
        model = SplitModel(edge, RemoteLLM(session, encoding=encoding))
        model.answer_loss(batch).backward()
        model.generate(collate(encode(edge, items), answers=False))
    sent = [tensor.detach().contiguous().numpy().tobytes() for frame in frames for tensor in frame.tensors.values()]
    rows = [row.numpy().tobytes() for item in items for row in item.pixels().flatten(0, 2)]
    assert rows and not any(row in value for row in rows for value in sent)
    features = [row.numpy().tobytes() for row in batch.features_MPE.flatten(0, 1)]
    assert any(row in value for row in features for value in sent) == (encoding == "factored"), (
        "dense: what they become"
    )


@pytest.mark.run
def test_with_the_llm_at_clients_no_step_leaves_them(backbone, tmp_path, frames):
    run(backbone, tmp_path / "run", "arm=fedavg_llm", "edge.rank=0", "rounds=1")
    verbs = {frame.verb for frame in frames}
    assert {"state", "update"} <= verbs <= {"open", "card", "state", "update", "edge"}, (
        "edge: the host makes it ready at its start"
    )


@pytest.mark.run
@pytest.mark.parametrize("sent", [True, False])
def test_test_questions_truths_reach_the_servers_folder_unless_it_says_not_to(backbone, tmp_path, sent):
    """The setting is the server's: a site's own word is FEDMM_ALLOW_TEXTS."""
    folder = run(backbone, tmp_path / "run", "rounds=1", f"evaluate.predictions={str(sent).lower()}")
    truths = [row["truth"] for row in read_rows(folder / "predictions.jsonl")]
    assert bool(truths) == sent
