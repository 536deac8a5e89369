"What a chapter can't show of training: helpers that fail."
import os
import signal

import psutil
import pytest
import torch

from llava_med.batching import Collator, encode
from llava_med.model import tiny_model
from llava_med.training import Stage, TrainingError, fit

STAGE = Stage('toy', ('projector', 'language_model'), 1e-3, epochs=2, batch_size=4)


def helpers(): return [p for p in psutil.Process().children() if 'spawn_main' in ' '.join(p.cmdline())]


@pytest.fixture(scope='module')
def toy():
    "A tiny model, samples of one question each, and their pictures' features."
    model, processor = tiny_model(image_size=24)
    tok = processor.tokenizer
    chat = [dict(role='user', content=[dict(type='image'), dict(type='text', text='which side?')]), dict(role='assistant', content='left')]
    n = model.config.image_seq_length
    samples = [dict(encode(tok, chat, n), image=i % 3) for i in range(16)]
    return samples, tok.pad_token_id, torch.randn(3, n, model.config.vision_config.hidden_size, generator=torch.Generator().manual_seed(0))


def test_a_bad_sample_in_a_helper_is_named_by_its_own_error(toy):
    samples, pad, features = toy
    bad = [dict(s, image=99 if i == 5 else s['image']) for i, s in enumerate(samples)]
    with pytest.raises(IndexError) as error: fit(tiny_model(image_size=24)[0], bad, Collator(pad, features), STAGE, workers=4)
    assert any(t.name == 'add' for t in error.traceback)   # it came from a helper
    assert not helpers()   # nobody is left behind


def test_a_killed_helper_is_reported(toy):
    samples, pad, features = toy
    def kill(row):
        if row['step'] == 1:
            for p in helpers(): os.kill(p.pid, signal.SIGKILL)
    with pytest.raises(TrainingError, match='threads=1'):
        fit(tiny_model(image_size=24)[0], samples, Collator(pad, features), STAGE, workers=2, report=kill)


def test_more_workers_than_samples(toy):
    samples, pad, features = toy
    models = [tiny_model(image_size=24)[0] for _ in range(2)]
    for m in models:   # a model that has been used carries hooks of transformers
        m(input_ids=torch.tensor([samples[0]['input_ids']])[:, -3:], output_hidden_states=True)
    one, many = (fit(m, samples[:6], Collator(pad, features), STAGE, workers=w) for m, w in zip(models, (1, 3)))
    assert [r['samples'] for r in one] == [r['samples'] for r in many]
    assert max(abs(a['loss'] - b['loss']) for a, b in zip(one, many)) < 1e-4
