"""Codecs: what is written can be read within its bound, and what is no tensor of the codec is refused in words."""

from __future__ import annotations

import pytest
import torch

from fedmm import codecs, seeds
from fedmm.link import wire

LOSSY = ["fp16", "bf16", "int8"]
SHAPES = [(), (0,), (3, 0), (1,), (63,), (64,), (65,), (5, 7), (2, 3, 100)]


def noise(shape, scale: float = 1.0, name: str = "noise") -> torch.Tensor:
    return scale * torch.randn(shape, generator=seeds.generator(0, name))


def sent(tensor: torch.Tensor, codec) -> torch.Tensor:
    """What arrives at the other end, over a real frame."""
    chunks = wire.encode(wire.Frame("x", {}, {f"x.{part}": t for part, t in codecs.pack(tensor, codec).items()}))
    frame = wire.decode(iter(chunks), 1 << 24)
    return codecs.unpack({n.removeprefix("x."): t for n, t in frame.tensors.items()}, codec, tuple(tensor.shape))


def step(tensor: torch.Tensor, codec) -> torch.Tensor:
    """Twice the largest error of each entry: the distance of two neighbouring numbers of the codec."""
    flat = tensor.float().flatten().abs()
    if codec == "int8":
        peaks = torch.stack([block.max() for block in flat.split(64)]) if len(flat) else flat
        per_block = peaks / 127 * (1 + 2**-7)  # rounding up to bfloat16 adds at most one in its last place
        return per_block.repeat_interleave(64)[: len(flat)].view(tensor.shape)
    spacing, smallest = {"fp16": (2**-10, 2**-24), "bf16": (2**-7, 2**-133)}[codec]
    return (spacing * flat).clamp(min=smallest).view(tensor.shape)


@pytest.mark.parametrize("scale", [1e-12, 1e-9, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("codec", LOSSY)
def test_what_is_sent_arrives_within_half_a_step(codec, shape, scale):
    tensor = noise(shape, scale)
    arrived = sent(tensor, codec)
    assert arrived.dtype == torch.float32 and arrived.shape == tensor.shape
    assert ((arrived - tensor).abs() <= step(tensor, codec) / 2).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_an_int8_entry_errs_by_half_its_blocks_scale(scale):
    tensor = noise((1000, 64), scale)
    scales = codecs.pack(tensor, "int8")["scale"].float()
    assert ((sent(tensor, "int8") - tensor).abs() <= scales[:, None] * 0.5000001).all()
    exact = tensor.abs().amax(1) / 127
    assert ((scales - exact).abs() <= exact * 2**-8).all()


def test_int8_by_hand():
    """The first block has scale 254 / 127 = 2, the second 12.7 / 127, which bfloat16 has nearest as 205 / 2048."""
    first = torch.tensor([254.0, -254.0, 3.0, 5.0, -1.0, 1.0, 2.5, 0.0] + 56 * [0.0])
    second = torch.tensor([12.7, -0.06, 0.05])
    parts = codecs.pack(torch.cat([first, second]), "int8")
    assert parts["scale"].dtype == torch.bfloat16
    assert parts["scale"].tolist() == [2.0, 205 / 2048]
    # 1.5 and 2.5 are ties and go to the even 2; 12.7 / (205 / 2048) = 126.9
    assert parts[""].tolist() == [127, -127, 2, 2, 0, 0, 1, 0] + 56 * [0] + [127, -1, 0]
    read = codecs.unpack(parts, "int8", (None,))
    assert read.tolist() == [254.0, -254.0, 4.0, 4.0, 0.0, 0.0, 2.0, 0.0] + 56 * [0.0] + [26035 / 2048, -205 / 2048, 0]


def test_half_precision_by_hand():
    tensor = torch.tensor([1 + 2**-10 + 2**-12, 1 + 2**-7 + 2**-9, 65504.0, 2e-8])
    assert sent(tensor, "fp16").tolist() == [1 + 2**-10, 1 + 2**-7 + 2**-9, 65504.0, 0.0]
    assert sent(tensor, "bf16").tolist() == [1.0, 1 + 2**-7, 65536.0, torch.tensor(2e-8).bfloat16().item()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_none_leaves_a_tensor_alone(dtype):
    tensor = noise((3, 5)).to(dtype)
    assert codecs.pack(tensor, "none")[""] is tensor
    assert codecs.unpack({"": tensor}, "none", (3, None)) is tensor


def test_int8_takes_at_most_1_04_bytes_an_entry():
    parts = codecs.pack(noise((100, 64)), "int8")
    assert sum(part.nbytes for part in parts.values()) <= 1.04 * 6400
    long, none = (sum(map(len, wire.encode(wire.Frame("x", {}, p)))) for p in (parts, {}))
    assert long - none <= 1.04 * 6400 + 200  # on the wire: names and shapes besides


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_sent_as_their_fp32(dtype, codec):
    tensor = noise((3, 70)).to(dtype)
    assert torch.equal(sent(tensor, codec), sent(tensor.float(), codec))


@pytest.mark.parametrize("codec", LOSSY)
def test_strided_tensors_are_sent_as_their_copies(codec):
    square = noise((70, 90))
    for strided in (square.T, square[:, ::3], square[::2, 5:], square[:1].expand(4, 90)):
        assert not strided.is_contiguous()
        assert torch.equal(sent(strided, codec), sent(strided.contiguous(), codec))


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("shape", [(64,), (130,), (40, 3)])
def test_the_input_is_never_written(codec, shape):
    tensor = noise(shape).requires_grad_()
    before, feedback = tensor.detach().clone(), codecs.Feedback()
    for _ in range(3):
        parts = feedback.pack("x", tensor, codec)
    copies = {name: part.clone() for name, part in parts.items()}
    codecs.unpack(parts, codec, shape).zero_()
    assert torch.equal(tensor, before)
    assert all(torch.equal(parts[name], copies[name]) and not parts[name].requires_grad for name in parts)


@pytest.mark.parametrize("codec", LOSSY)
def test_zeros_stay_zeros(codec):
    assert torch.equal(sent(torch.zeros(3, 50), codec), torch.zeros(3, 50))
    if codec == "int8":
        assert not codecs.pack(torch.zeros(3, 50), codec)["scale"].any()


def test_a_small_block_beside_a_large_one_keeps_its_precision():
    tensor = torch.stack([noise(64, 1e-12), noise(64, 1e4, "large"), torch.zeros(64)])
    error = (sent(tensor, "int8") - tensor).abs().amax(1)
    assert error[0] <= tensor[0].abs().max() / 250
    assert error[1] <= tensor[1].abs().max() / 250
    assert error[2] == 0


@pytest.mark.parametrize("smallest", [1e-36, 1e-39, 1e-42, 1.4e-45])
def test_the_smallest_fp32_numbers_make_no_nan(smallest):
    tensor = torch.tensor([smallest, -smallest, 0.0])
    assert (sent(tensor, "int8") - tensor).abs().max() <= max(smallest / 250, 2.0**-126)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("codec", ["fp16", "bf16", "int8"])
def test_what_travelled_once_travels_again_unchanged(codec, scale):
    """Features are rounded where they are made, then written again for the link: both ends must hold the same."""
    tensor = noise((500, 67), scale if codec != "fp16" else 1.0)
    once = codecs.rounded(tensor, codec)
    assert torch.equal(codecs.rounded(once, codec), once) and not torch.equal(once, tensor)


def test_fp16_loses_what_int8_and_bf16_keep():
    tiny = noise(256, 1e-9)
    assert not sent(tiny, "fp16").any()
    for codec in ("bf16", "int8"):
        assert (sent(tiny, codec) - tiny).norm() < 0.02 * tiny.norm()


def test_both_ends_read_the_same_bits():
    """A code times a bfloat16 scale has 15 bits, so fp32 holds it and no device rounds it another way."""
    tensor = noise(6400, 1e-3)
    parts = codecs.pack(tensor, "int8")
    exact = parts[""].double().view(-1, 64) * parts["scale"].double()[:, None]
    assert torch.equal(codecs.unpack(parts, "int8", (6400,)).double(), exact.view(-1))


# feedback


def mean_errors(tensor: torch.Tensor, codec, sends: int, pack) -> torch.Tensor:
    """How far the mean of what arrived is from the constant tensor, entry by entry."""
    total = torch.zeros_like(tensor, dtype=torch.float64)
    for _ in range(sends):
        total += codecs.unpack(pack("x", tensor, codec), codec, tuple(tensor.shape))
    return (total / sends - tensor).abs()


@pytest.mark.parametrize("sends", [1, 7, 50])
@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0])
@pytest.mark.parametrize("codec", LOSSY)
def test_feedback_makes_the_mean_over_sends_converge(codec, scale, sends):
    tensor = noise((3, 100), scale)
    with_residual = tensor.abs() + step(tensor, codec)  # what is sent is larger than the tensor by up to a residual
    bound = step(with_residual, codec) / sends + 1e-6 * tensor.abs()  # and fp32 rounds the sums
    assert (mean_errors(tensor, codec, sends, codecs.Feedback().pack) <= bound).all()


@pytest.mark.parametrize("codec", LOSSY)
def test_without_feedback_the_error_stays(codec):
    tensor = noise((3, 100))
    lost = (sent(tensor, codec) - tensor).abs()
    stays = mean_errors(tensor, codec, 50, lambda name, tensor, codec: codecs.pack(tensor, codec))
    assert torch.allclose(stays, lost.double(), rtol=1e-6)
    corrected = mean_errors(tensor, codec, 50, codecs.Feedback().pack)
    assert corrected.mean() < stays.mean() / 10


def test_feedback_by_hand():
    """Scale 1: 0.3 arrives as 0, 0.6 as 1, and with the 0.4 that was too much 0.3 - 0.4 as 0."""
    feedback, arrived = codecs.Feedback(), []
    for _ in range(4):
        parts = feedback.pack("x", torch.tensor([127.0, 0.3]), "int8")
        arrived.append(codecs.unpack(parts, "int8", (2,))[1].item())
    assert arrived == [0.0, 1.0, 0.0, 0.0]


def test_residuals_are_kept_by_name():
    first = codecs.pack(torch.tensor([127.0, 0.3]), "int8")[""].tolist()

    def codes(feedback, name):
        return feedback.pack(name, torch.tensor([127.0, 0.3]), "int8")[""].tolist()

    feedback = codecs.Feedback()
    assert codes(feedback, "x") == first and codes(feedback, "y") == first
    assert codes(feedback, "x") != first and codes(feedback, "y") != first


def test_a_changed_shape_starts_its_residual_again():
    feedback = codecs.Feedback()
    feedback.pack("x", torch.tensor([127.0, 0.3]), "int8")
    other = torch.tensor([[127.0, 0.3]])
    assert torch.equal(feedback.pack("x", other, "int8")[""], codecs.pack(other, "int8")[""])
    assert not torch.equal(feedback.pack("x", other, "int8")[""], codecs.pack(other, "int8")[""])


def test_feedback_with_none_adds_and_keeps_nothing():
    feedback, tensor = codecs.Feedback(), torch.tensor([127.0, 0.3])
    assert feedback.pack("x", tensor, "none")[""] is tensor
    assert torch.equal(feedback.pack("x", tensor, "int8")[""], codecs.pack(tensor, "int8")[""])
    assert feedback.pack("x", tensor, "none")[""] is tensor


def test_a_refused_send_leaves_the_residual():
    feedback, tensor = codecs.Feedback(), torch.tensor([127.0, 0.3])
    feedback.pack("x", tensor, "int8")
    for wrong in (torch.tensor([1.0, float("nan")]), torch.tensor([1, 2])):
        with pytest.raises(ValueError, match="int8 writes"):
            feedback.pack("x", wrong, "int8")
    assert feedback.pack("x", tensor, "int8")[""].tolist() == [127, 1]


# what is refused


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", ["inf", "-inf", "nan"])
def test_what_is_not_finite_is_refused_wherever_it_stands(bad, dtype, codec):
    for at in (0, 63, 64, 100, 199):
        tensor = noise(200).to(dtype)
        tensor[at] = float(bad)
        with pytest.raises(ValueError, match=f"{codec} writes finite numbers and the tensor has an inf or a nan"):
            codecs.pack(tensor, codec)


@pytest.mark.parametrize(
    ("codec", "largest", "over", "says"),
    [
        ("fp16", 65519.0, 65520.0, "fp16 ends at 65504 and the tensor reaches 65520; use bf16 or int8"),
        ("bf16", 3.3895e38, 3.4e38, "bf16 ends at 3.3895e\\+38 and the tensor reaches 3.4e\\+38"),
        ("int8", 1.688e38, 1.69e38, "int8 ends at 1.6881e\\+38 and the tensor reaches 1.69e\\+38"),
    ],
)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_overflow_names_the_largest_and_the_way_out(codec, largest, over, says, sign):
    assert sent(torch.tensor([sign * largest, 1.0]), codec).isfinite().all()
    with pytest.raises(ValueError, match=says):
        codecs.pack(torch.tensor([1.0, sign * over]), codec)
    with pytest.raises(ValueError, match="reaches 1e\\+300"):
        codecs.pack(torch.tensor([1.0, sign * 1e300], dtype=torch.float64), codec)


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_what_is_not_floating_is_refused(dtype, codec):
    with pytest.raises(ValueError, match=f"{codec} writes floating tensors, got {dtype}; send it with codec none"):
        codecs.pack(torch.ones(3, dtype=dtype), codec)


CODES = torch.ones(2, 65, dtype=torch.int8)
SCALES = torch.ones(3, dtype=torch.bfloat16)


def scales(*values: float) -> dict[str, torch.Tensor]:
    return {"": CODES, "scale": torch.tensor(values).bfloat16()}


def test_parts_made_by_hand_are_read():
    parts = {"": CODES, "scale": torch.tensor([1.0, 2.0, 0.0]).bfloat16()}
    read = codecs.unpack(parts, "int8", (2, None)).flatten()
    assert read.tolist() == 64 * [1.0] + 64 * [2.0] + 2 * [0.0]
    strided = {**parts, "": CODES.T.contiguous().T}
    assert torch.equal(codecs.unpack(strided, "int8", (2, 65)).flatten(), read)


@pytest.mark.parametrize(
    ("codec", "parts", "says"),
    [
        ("int8", {"": CODES}, "its scales.* got \\[''\\]"),
        ("int8", {"scale": SCALES}, "its values.* got \\['scale'\\]"),
        ("int8", {}, "got \\[\\]; do both ends run one codec"),
        ("fp16", {"": CODES.half(), "scale": SCALES}, "fp16 is the pieces .* got \\['', 'scale'\\]"),
        ("none", {"": CODES.half(), "x" * 1000: SCALES}, "none is the pieces .{100,200}; do both ends run one codec"),
        ("int8", {"": CODES.float(), "scale": SCALES}, "int8 holds torch.int8, got torch.float32"),
        ("fp16", {"": CODES.float()}, "fp16 holds torch.float16, got torch.float32"),
        ("bf16", {"": CODES.half()}, "bf16 holds torch.bfloat16, got torch.float16"),
        ("int8", {"": CODES, "scale": SCALES[:2]}, "130 codes need scales \\(3,\\) of torch.bfloat16, got \\(2,\\)"),
        ("int8", {"": CODES, "scale": SCALES[:, None]}, "got \\(3, 1\\) of torch.bfloat16"),
        ("int8", {"": CODES, "scale": SCALES.float()}, "got \\(3,\\) of torch.float32"),
        ("int8", {"": CODES[:, :0], "scale": SCALES[:1]}, "0 codes need scales \\(0,\\)"),
        ("int8", scales(1, -1, 1), "scales lie in \\[0, 1.33e\\+36\\], got \\[-1, 1\\]"),
        ("int8", scales(1, 1, float("inf")), "got \\[1, inf\\]"),
        ("int8", scales(1, float("nan"), 1), "got \\[nan, nan\\]"),
        ("int8", scales(1, 1, 2.0**121), "got \\[1, 2.66e\\+36\\]"),
        ("fp16", {"": torch.tensor([[1.0], [float("inf")]]).half()}, "the fp16 values are not finite"),
        ("bf16", {"": torch.tensor([[1.0], [float("nan")]]).bfloat16()}, "the bf16 values are not finite"),
    ],
)
def test_parts_that_do_not_fit_are_refused_with_their_reason(codec, parts, says):
    with pytest.raises(ValueError, match=says):
        codecs.unpack(parts, codec, (2, None))


@pytest.mark.parametrize("codec", ["none", *LOSSY])
@pytest.mark.parametrize("shape", [(2, None, 1), (3, None), (2, 64), (130,)])
def test_another_shape_is_refused(shape, codec):
    parts = codecs.pack(noise((2, 65)), codec)
    wanted = str(tuple("any" if size is None else size for size in shape))
    with pytest.raises(ValueError, match="the values have shape \\(2, 65\\), wanted ") as refused:
        codecs.unpack(parts, codec, shape)
    assert str(refused.value).endswith(wanted)


def test_the_largest_scale_times_any_code_is_finite():
    parts = {"": torch.tensor([-128, 127], dtype=torch.int8), "scale": torch.tensor([2.0**120]).bfloat16()}
    assert codecs.unpack(parts, "int8", (2,)).isfinite().all()


def test_error_feedback_keeps_the_names_used_last():
    """Found in a review: each step gave its term a fresh name, and the host kept a residual for every one."""
    feedback, tensor = codecs.Feedback(names=2), torch.tensor([127.0, 0.3])
    fresh = codecs.pack(tensor, "int8")
    for name in ("a", "b", "c"):
        feedback.pack(name, tensor, "int8")
    assert len(feedback._residuals) == 2
    assert all(torch.equal(part, fresh[key]) for key, part in feedback.pack("a", tensor, "int8").items())
