"""A TLS host as a process of its own, for tests that attack it: prints a line when it is up, and one for each update.

    python door_host.py FOLDER    where small_llava() has left a model

It ends with its standard input.
"""

from __future__ import annotations

import json
import sys

import torch
from helpers import PROMPT
from transformers import AutoProcessor, LlavaForConditionalGeneration

from fedmm import seeds, tree
from fedmm.edge import frozen_modules
from fedmm.link import tls
from fedmm.llm.local import LocalLLM
from fedmm.serving.features import Features
from fedmm.serving.host import Host
from fedmm.storage.tensor_store import Store

CLIENTS = 8


def main(folder: str) -> None:
    torch.set_num_threads(1)
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    frozen = frozen_modules.take(model, AutoProcessor.from_pretrained(folder))
    edge, _ = frozen_modules.build(frozen, rank=4, alpha=8.0)
    edge.reset(seeds.generator(0, "test edge"))

    def arrived(round, update, moved):
        with open("/dev/null"):  # an update is journalled: the host needs a descriptor for it
            say(update=update.client, digest=tree.digest(update.delta))

    with Host(
        LocalLLM(model),
        card=frozen_modules.describe(model, frozen, PROMPT),
        edge=frozen,
        features=Features(*frozen_modules.build_base(frozen), Store(memory_bytes=1 << 28)),
        on_update=arrived,
        authority=tls.Authority(),
    ) as host:
        host.open_round(1, edge.state(), list(range(CLIENTS)))
        shown = [vars(host.identity(client)) for client in range(CLIENTS)]
        say(port=host.port, tokens=[host.token(1, client) for client in range(CLIENTS)], identities=shown)
        sys.stdin.read()


def say(**about) -> None:
    print(json.dumps(about), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
