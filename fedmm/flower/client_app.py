"""The ClientApp: a message in, a client's part in the round, a message out."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedmm.flower import messages
from fedmm.runs.client import take_part

app = ClientApp()


@app.query()
def who(message: Message, context: Context) -> Message:
    """Which client this node is: `partition-id` of its node config (simulation sets it, a SuperNode is told)."""
    if "partition-id" not in context.node_config:
        raise ValueError('this SuperNode has no client number; start it with --node-config "partition-id=0"')
    return messages.say_who(message, int(context.node_config["partition-id"]))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Be scored on the state that arrived, train, send the update over the link."""
    return messages.send_report(take_part(messages.read_order(message)), message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Only be scored."""
    return messages.send_report(take_part(messages.read_order(message)), message)
