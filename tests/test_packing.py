"Training on packed rows is training on the separate samples."
import random

import pytest
import torch
from llava_med.train.batches import Collator, encode, pack_shared_prefixes
from llava_med.models.llava import tiny_model
from llava_med.train.packing import PackedCollator, pack_rows, split_row
from llava_med.train.loop import Stage, fit


@pytest.fixture(scope='module')
def toy():
    "Conversations of different length about five pictures, two of them about none."
    model, processor = tiny_model(image_size=24)
    tok, n, rng = processor.tokenizer, model.config.image_seq_length, random.Random(0)
    def sample(i):
        picture = [] if i % 7 == 0 else [dict(type='image')]
        chat = [dict(role='user', content=[*picture, dict(type='text', text='which side? '*rng.randint(1, 4))]), dict(role='assistant', content='left or right '*rng.randint(1, 6))]
        return dict(encode(tok, chat, n), image=i % 5 if picture else None)
    features = torch.randn(5, n, model.config.vision_config.hidden_size, generator=torch.Generator().manual_seed(0))
    return [sample(i) for i in range(14)], tok.pad_token_id, features, model.config.image_token_id


def weights(model): return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize('workers', [1, 2])
def test_a_step_on_one_row_is_a_step_on_its_samples(toy, workers):
    samples, pad, features, image = toy
    rows = [pack_rows(samples[:7], 10_000), pack_rows(samples[7:], 10_000)]
    assert [len(r) for r in rows] == [1, 1]
    stage = dict(name='toy', trainable=('projector', 'language_model'), lr=1e-3, epochs=3)
    for part, row in zip((samples[:7], samples[7:]), rows):
        one, packed = tiny_model(image_size=24)[0], tiny_model(image_size=24)[0]
        a = fit(one, part, Collator(pad, features), Stage(**stage, batch_size=7))
        b = fit(packed, row*workers if workers > 1 else row, PackedCollator(pad, features), Stage(**stage, batch_size=workers), grad_workers=workers)
        assert max(abs(x['loss'] - y['loss']) for x, y in zip(a, b)) < 1e-4   # a row twice has the mean of the row
        assert (weights(one) - weights(packed)).abs().max() < 1e-4
        assert packed.config.text_config._attn_implementation == one.config.text_config._attn_implementation


def test_shared_pictures_pack_too(toy):
    samples, pad, features, image = toy
    rows = pack_rows(pack_shared_prefixes(samples, image), 400)
    assert sum(len(r['input_ids']) for r in rows) < sum(len(s['input_ids']) for s in samples)
    model = tiny_model(image_size=24)[0]
    from llava_med.train.batches import batch_loss
    total, n = batch_loss(model, Collator(pad, features)(samples))
    model.set_attn_implementation({'text_config': 'segmented'})
    parts = [batch_loss(model, PackedCollator(pad, features)([r])) for r in rows]
    assert sum(m for _, m in parts) == n and abs(sum(t.item() for t, _ in parts) - total.item()) < 1e-3


def test_no_sample_is_lost_and_none_is_cut(toy):
    samples = toy[0]
    rng = random.Random(1)
    for _ in range(20):
        some = rng.choices(samples, k=rng.randint(1, 14))
        rows = pack_rows(some, rng.randint(1, 300))
        pieces = lambda r: sorted((tuple(i for i, b in zip(r['input_ids'], r['blocks']) if b == k) for k in range(max(r['blocks']) + 1)))
        assert sorted(p for r in rows for p in pieces(r)) == sorted(tuple(s['input_ids']) for s in some)
        for r in rows: assert r['blocks'] == sorted(r['blocks']) and len({len(r[k]) for k in ('input_ids', 'labels', 'segments', 'blocks', 'positions')}) == 1


def test_short_pieces_in_bfloat16_are_as_exact_as_before(toy, monkeypatch):
    "Gradients under autocast, with weights that are kept and with PyTorch's attention, beside float32."
    from llava_med.models import segmented_attention as attention
    from llava_med.train.batches import batch_loss
    samples, pad, features, image = toy
    rows, calls, real = pack_rows(pack_shared_prefixes(samples, image), 400), [], attention._Weights.apply
    model = tiny_model(image_size=24)[0]
    model.set_attn_implementation({'text_config': 'segmented'})
    def gradients(bf16):
        model.zero_grad()
        for r in rows:
            with torch.autocast('cpu', torch.bfloat16, enabled=bf16): batch_loss(model, PackedCollator(pad, features)([r]))[0].backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    exact = gradients(False)
    monkeypatch.setattr(attention._Weights, 'apply', lambda *a: calls.append(1) or real(*a))
    kept = gradients(True)
    assert calls
    monkeypatch.setattr(attention, '_computes_bf16', lambda x: False)
    before = gradients(True)
    errors = [float((g - exact).norm()/exact.norm()) for g in (kept, before)]
    assert 0 < errors[0] < 1.5*errors[1] + 1e-4, errors


def test_a_packed_row_is_not_packed_again(toy):
    "Its blocks would become one block, in which its samples see each other."
    samples, pad, features, image = toy
    row, = pack_rows(samples[:3], 10_000)
    for made in ([samples[3], row], [row, samples[3]]):
        with pytest.raises(ValueError, match=f'Sample {made.index(row)} is a packed row'): PackedCollator(pad, features)(made)


def test_images_of_another_size_are_not_guessed_at(toy):
    samples, pad, features, image = toy
    row, = pack_rows(samples[1:4], 10_000)
    n = samples[1]['input_ids'].count(image)
    assert len(split_row(row, image, n)) == 3
    with pytest.raises(ValueError, match=f'{3*n} image tokens for 3 images of {n + 1} tokens'): split_row(row, image, n + 1)
