# SPDX-License-Identifier: MIT
"""sequence_balance_loss of padded and unequal sequences, and of counts from outside."""

import pytest
import torch

from kimi_ops import sequence_balance_loss, sequence_counts, topk_gate
from kimi_ops.reference import balance as reference

SCORES = ("sigmoid", "softmax", "sqrtsoftplus")
LENGTHS = (70, 0, 1, 33, 130)


def batch(experts=37, k=5, tail=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(LENGTHS) + tail
    logits = torch.randn(tokens, experts, generator=generator) * 2
    valid = torch.rand(tokens, generator=generator) < 0.7
    ids = topk_gate(logits, k).indices
    return logits, ids, torch.tensor(LENGTHS).cumsum(0).int(), valid


def one_by_one(logits, ids, offsets, valid, function="sigmoid"):
    """The mean over sequences of the loss of each, cut out and without padding; in fp64."""
    losses, begin = [], 0
    for end in offsets.tolist():
        keep = torch.arange(begin, end)[valid[begin:end]]
        losses.append(reference.sequence_balance_loss(
            logits[keep].double(), ids[keep], 1, function, 1.0
        ))  # fmt: skip
        begin = end
    return torch.stack(losses).mean()


def test_padding_is_no_part_of_a_sequence(engine):
    """A loss that counts it in S gives 0.39 where 1.08 is right."""
    logits, _, _, _ = batch(experts=24, k=4)
    logits = (logits[:200] + torch.linspace(-1.05, 1.05, 24)).to(engine.device)
    valid = torch.arange(200, device=engine.device) < 120
    gate = topk_gate(logits, 4, valid=valid)
    blank = logits.masked_fill(~valid[:, None], float("nan"))
    diluted = sequence_balance_loss(blank, gate.indices, coefficient=1.0).item()
    right = sequence_balance_loss(blank, gate.indices, valid=valid, coefficient=1.0).item()
    alone = sequence_balance_loss(logits[:120], gate.indices[:120], coefficient=1.0).item()
    assert right == pytest.approx(alone, rel=1e-6) and round(right, 2) == 1.08
    assert diluted == pytest.approx(0.36 * right, rel=1e-5) and round(diluted, 2) == 0.39


@pytest.mark.parametrize("score_function", SCORES)
def test_unequal_lengths_and_padding(engine, score_function):
    logits, ids, offsets, valid = batch()
    x = logits.clone().to(engine.device).requires_grad_()
    loss = sequence_balance_loss(
        x, ids.to(engine.device), offsets=offsets.to(engine.device),
        valid=valid.to(engine.device), score_function=score_function, coefficient=1.0,
    )  # fmt: skip
    want = one_by_one(logits, ids, offsets, valid, score_function)
    assert loss.item() == pytest.approx(want.item(), rel=2e-6)
    loss.backward()
    exact = logits.double().requires_grad_()
    reference.sequence_balance_loss(
        exact, ids, 1, score_function, 1.0, offsets=offsets, valid=valid
    ).backward()
    assert (x.grad.cpu().double() - exact.grad).norm() < 2e-6 * exact.grad.norm()
    none = ~valid | (torch.arange(len(logits)) >= offsets[-1])
    assert not x.grad.cpu()[none].any() and x.grad.cpu()[~none].any(1).all()


def test_what_is_in_no_sequence_is_not_read(engine):
    logits, ids, offsets, valid = batch()
    none = ~valid | (torch.arange(len(logits)) >= offsets[-1])
    poisoned = logits.masked_fill(none[:, None], float("inf"))
    arguments = ids.to(engine.device), offsets.to(engine.device), valid.to(engine.device)
    values = []
    for z in (logits, poisoned):
        x = z.clone().to(engine.device).requires_grad_()
        loss = sequence_balance_loss(x, arguments[0], offsets=arguments[1], valid=arguments[2])
        loss.backward()
        values.append((loss, x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))


def test_equal_lengths_by_offsets_are_the_same_bits(engine):
    logits, ids, _, valid = (t[:120].to(engine.device) for t in batch())
    ends = torch.tensor([40, 80, 120], device=engine.device)
    for mask in (None, valid):
        a = sequence_balance_loss(logits, ids, num_sequences=3, valid=mask)
        assert torch.equal(a, sequence_balance_loss(logits, ids.long(), offsets=ends, valid=mask))


def test_counts(engine):
    logits, ids, offsets, valid = batch(k=3)
    ids[::5, 1], ids[::7, 2] = -1, 37
    got = sequence_counts(
        ids.to(engine.device), 37, offsets=offsets.to(engine.device), valid=valid.to(engine.device)
    )
    begin = 0
    for n, end in enumerate(offsets.tolist()):
        here = ids[begin:end][valid[begin:end]]
        assert got.sequence_tokens[n] == len(here)
        counted = torch.bincount(here.flatten()[(here.flatten() >= 0)].long(), minlength=38)[:37]
        assert torch.equal(got.tokens_per_expert[n].cpu().long(), counted)
        begin = end
    want = reference.sequence_counts(ids, 37, 1, offsets, valid)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))


def test_a_sequence_in_parts_on_two_ranks(engine):
    """Context parallelism: counts and lengths summed over the ranks; losses and gradients add."""
    logits, ids, _, valid = (t[:200].to(engine.device) for t in batch(seed=3))
    whole = logits.clone().requires_grad_()
    want = sequence_balance_loss(whole, ids, valid=valid, coefficient=1.0)
    want.backward()
    halves = [slice(0, 90), slice(90, 200)]
    parts = [sequence_counts(ids[half], 37, valid=valid[half]) for half in halves]
    counts, tokens = (sum(pair) for pair in zip(*parts, strict=True))
    x = logits.clone().requires_grad_()
    losses = [
        sequence_balance_loss(
            x[half], ids[half], valid=valid[half], tokens_per_expert=counts.to(kind),
            sequence_tokens=tokens.to(kind), coefficient=1.0,
        )
        for half, kind in zip(halves, (torch.int32, torch.int64), strict=True)
    ]  # fmt: skip
    total = sum(losses)
    total.backward()
    assert total.item() == pytest.approx(want.item(), rel=1e-6)
    torch.testing.assert_close(x.grad, whole.grad, rtol=1e-6, atol=1e-9)


def test_any_thread_count_gives_the_same_bits(cpu_engine, two_thread_counts):
    logits, ids, offsets, valid = batch()
    found = []
    for threads in two_thread_counts:
        torch.set_num_threads(threads)
        x = logits.clone().requires_grad_()
        loss = sequence_balance_loss(x, ids, offsets=offsets, valid=valid)
        loss.backward()
        found.append((loss, x.grad, *sequence_counts(ids, 37, offsets=offsets, valid=valid)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_compile_full_graph():
    torch._dynamo.reset()

    def loss(z, ids, offsets, valid):
        return sequence_balance_loss(z * 1.5, ids, offsets=offsets, valid=valid)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (240, 250):
        logits, ids, offsets, valid = (t[:tokens] for t in batch(tail=16))
        a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        x, y = compiled(a, ids, offsets, valid), loss(b, ids, offsets, valid)
        x.backward()
        y.backward()
        assert torch.equal(x, y) and torch.equal(a.grad, b.grad)


def test_reference_gradcheck():
    logits, ids, offsets, valid = (t[-20:] for t in batch(experts=6, k=2))
    offsets, z = torch.tensor([4, 4, 17]), logits.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: reference.sequence_balance_loss(
            z, ids, 1, "sigmoid", 1.0, offsets=offsets, valid=valid
        ),
        (z,),
    )


LOGITS, IDS, ENDS = torch.zeros(4, 16), torch.zeros(4, 2, dtype=torch.int32), torch.tensor([1, 4])
COUNTS = torch.zeros(2, 16, dtype=torch.int32)


@pytest.mark.parametrize(
    "text,options",
    [
        (r"offsets: expected 0 <= offsets\[0\] .* R = 4, got \[4, 1\]", {"offsets": ENDS.flip(0)}),
        (r"offsets: expected 0 <= .*got \[1, 5\]", {"offsets": ENDS.new_tensor([1, 5])}),
        (r"offsets: expected shape \[N\], got \[1, 2\]", {"offsets": ENDS[None]}),
        ("num_sequences: expected 2 as offsets are, got 3", {"offsets": ENDS, "num_sequences": 3}),
        (r"valid: expected shape \[4\], got \[3\]", {"valid": torch.ones(3).bool()}),
        ("sequence_tokens: expected beside tokens_per_expert", {"tokens_per_expert": COUNTS[:1]}),
        (r"tokens_per_expert: expected shape \[1, 16\], got \[2, 16\]",
         {"tokens_per_expert": COUNTS, "sequence_tokens": COUNTS[:, 0]}),
        (r"sequence_tokens: expected shape \[2\], got \[1\]",
         {"offsets": ENDS, "tokens_per_expert": COUNTS, "sequence_tokens": COUNTS[:1, 0]}),
    ],
)  # fmt: skip
def test_bad_input(text, options):
    with pytest.raises(ValueError, match=text):
        sequence_balance_loss(LOGITS, IDS, **options)
