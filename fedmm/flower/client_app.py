"""The ClientApp: a message in, a client's part in the round, a message out."""

from __future__ import annotations

import logging
from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedmm.federation.client import carry_out
from fedmm.federation.reasons import Lost, Reason, because
from fedmm.federation.site import Site
from fedmm.flower import messages

log = logging.getLogger("fedmm.site")
app = ClientApp()
IN_PROCESS = "in-process"  # in a node's config: server and client are one process (fedmm/flower/inprocess.py)


@app.query()
def who(message: Message, context: Context) -> Message:
    """Which client this node is: `partition-id` of its node config (simulation sets it, a SuperNode is told)."""
    return _answered(message, context, lambda: messages.say_who(message, _client(context)))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Be scored on the state that arrived, train, send the update over the link."""
    return _answered(message, context, lambda: _part(message, context))


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Only be scored."""
    return _answered(message, context, lambda: _part(message, context))


def _part(message: Message, context: Context) -> Message:
    client = _client(context)
    site = Site(client, trusts_server=True) if context.node_config.get(IN_PROCESS) else Site.of(client)
    with because(Reason.ORDER):
        order = messages.read_order(message)
    site.admit(order)
    return messages.send_report(site.release(carry_out(order)), message)


def _client(context: Context) -> int:
    number = str(context.node_config.get("partition-id", ""))
    if not number.isdecimal():
        raise Lost(
            Reason.ORDER,
            f'this SuperNode has no client number ({number!r}); start it with --node-config "partition-id=0"',
        )
    return int(number)


def _answered(message: Message, context: Context, work: Callable[[], Message]) -> Message:
    """What `work` gives, or a reply with the reason why it could not: its text stays in this site's log."""
    if context.node_config.get(IN_PROCESS):
        return work()
    try:
        with because(Reason.FAULT):
            return work()
    except Lost as lost:
        log.error("%s: %s", lost.reason.value, lost, exc_info=lost.__cause__)
        return messages.send_lost(lost, message)
