"""A node's key, and the headers that Flower signs with it."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta

from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def signed(key, *, late: timedelta = timedelta(), signer=None) -> list[tuple[bytes, bytes]]:
    """Flower's headers of a node with this key, whose clock is `late`."""
    stamp = (datetime.now(UTC) - late).isoformat().encode()
    public = public_key_to_bytes(key.public_key())
    return [
        (b"flwr-public-key", base64.b64encode(public)),
        (b"flwr-signature", base64.b64encode(sign_message(signer or key, stamp))),
        (b"flwr-timestamp", stamp),
    ]
