"""Write docs/MESSAGES.md, the table of what client and host say to each other, from the messages themselves.

python scripts/messages.py
"""

from __future__ import annotations

from dataclasses import MISSING as _MISSING
from pathlib import Path
from typing import Any

from fedmm.link import messages, wire
from fedmm.link.fields import One, places
from fedmm.link.steps import DenseStep, FactoredStep

PAGE = Path(__file__).parents[1] / "docs" / "MESSAGES.md"
HEAD = f"""# Messages of the link

Written by `python scripts/messages.py` from [fedmm/link/messages.py](../fedmm/link/messages.py) and
[fedmm/link/steps.py](../fedmm/link/steps.py); a test compares them. This is version {wire.PROTOCOL} of the protocol.
Each end tells the other its version when a stream opens. Two ends that differ refuse each other and say which to
upgrade.

A frame is a verb, a JSON header and tensors ([The link](LINK.md)). A reply has the verb of its request; a refusal has
`{messages.Failure.FAILS}`, and the frame that opens a session `{messages.Done.OPENS}`. Any request may have `codecs`
in its header: four words for `features`, `h`, `gradients` and `logits` that say how tensors of these kinds are written
in both directions. Letters are sizes: B batch, T positions, D the LLM's width, R rank, V vocabulary, A answer
positions, N positions of one kind and M those of images packed over the batch, S samples with images, I a sample's
images, P patches, E encoder width, K a key's bytes, L branches. An entry with a ? may be missing.
"""


def page() -> str:
    """The page as it should be."""
    requests = [_row(f"`{kind.verb}` up", kind, kind.channel) for kind in messages.REQUESTS]
    replies = [_row(f"`{kind.verb}` down", kind.reply, kind.channel) for kind in messages.REQUESTS]
    pairs = [row for pair in zip(requests, replies, strict=True) for row in pair]
    pairs.append(_row(f"`{messages.Failure.FAILS}` down", messages.Failure, ""))
    steps = [_row("dense", DenseStep), _row("factored", FactoredStep)]
    verbs = [f"| `{kind.verb}` | {' '.join(str(kind.__doc__).split())} |" for kind in messages.REQUESTS]
    return "\n".join(
        [
            HEAD,
            "| verb | what it asks for |\n| --- | --- |",
            *verbs,
            "\n| frame | header | tensors | channel in the ledger |\n| --- | --- | --- | --- |",
            *pairs,
            "\nFour requests carry a step, in one of two encodings. A factored step has exactly one of `keys`,",
            "`features` and `image_part`.\n\n| step | header | tensors |\n| --- | --- | --- |",
            *steps,
            "",
        ]
    )


def _row(name: str, kind: Any, *more: str) -> str:
    optional = {field.name for field in kind.__dataclass_fields__.values() if field.default is not _MISSING}
    header, tensors = [], []
    for field, place in places(kind).items():
        mark = "?" if field in optional else ""
        header += [f"`{key}`{mark}" for key in place.keys]
        tensors += [f"{_tensor(one)}{mark}" for one in place.tensors]
        if field == "step":
            tensors.append("a step")
    return "| " + " | ".join([name, ", ".join(header), "; ".join(tensors), *more]) + " |"


def _tensor(one: One) -> str:
    dtype = f" {one.dtype}".replace("torch.", "") if not isinstance(one.dtype, str) else ""
    shape = f" ({one.shape})" if one.shape else ""
    return f"`{one.name}`{shape}{dtype}" + (f", by `{one.codec}`" if one.codec else "")


if __name__ == "__main__":
    PAGE.write_text(page())
