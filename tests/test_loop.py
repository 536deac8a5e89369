"What a chapter can't show of training: processes that fail, and processes that agree."
import ast
import contextlib
import os
import random
import signal
import subprocess
import sys

import psutil
import pytest
import torch
from PIL import Image

from conftest import REPO
from llava_med.train import loop
from llava_med.models.adapters import add_lora
from llava_med.train.batches import Collator, encode
from llava_med.train.launch import launch
from llava_med.train.memory import MemoryPlan
from llava_med.models.llava import tiny_model
from llava_med.train.loop import Stage, TrainingError, fit

STAGE = Stage('toy', ('projector', 'language_model'), 1e-3, epochs=2, batch_size=4)
IMAGE = tiny_model(image_size=24)[0].config.image_token_id


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
    with pytest.raises(IndexError) as error: fit(tiny_model(image_size=24)[0], bad, Collator(pad, features), STAGE, grad_workers=4)
    assert any(t.name == 'add' for t in error.traceback)   # it came from a helper
    assert not helpers()   # nobody is left behind


def test_a_killed_helper_is_reported(toy):
    samples, pad, features = toy
    def kill(row):
        if row['step'] == 1:
            for p in helpers(): os.kill(p.pid, signal.SIGKILL)
    with pytest.raises(TrainingError, match='threads=1'):
        fit(tiny_model(image_size=24)[0], samples, Collator(pad, features), STAGE, grad_workers=2, report=kill)


def test_more_workers_than_samples(toy):
    samples, pad, features = toy
    models = [tiny_model(image_size=24)[0] for _ in range(2)]
    for m in models:   # a model that has been used carries hooks of transformers
        m(input_ids=torch.tensor([samples[0]['input_ids']])[:, -3:], output_hidden_states=True)
    one, many = (fit(m, samples[:6], Collator(pad, features), STAGE, grad_workers=w) for m, w in zip(models, (1, 3)))
    assert [r['samples'] for r in one] == [r['samples'] for r in many]
    assert max(abs(a['loss'] - b['loss']) for a, b in zip(one, many)) < 1e-4


RUN = '''
import json, os, sys, torch
from pathlib import Path
from llava_med.train.batches import encode
from llava_med.train.vision_cache import ImageFiles
from llava_med.train.batches import Collator
from llava_med.models.llava import tiny_model
from llava_med.train.loop import Stage, Validation, fit

if __name__ == '__main__':
    folder = Path(sys.argv[1])
    model, processor = tiny_model(image_size=24)
    tok, n = processor.tokenizer, model.config.image_seq_length
    words = 'left right top bottom none one two three'.split()
    def chat(i): return [dict(role='user', content=[dict(type='image'), dict(type='text', text='where?')]), dict(role='assistant', content=words[i % 8])]
    samples = [dict(encode(tok, chat(i), n), image=i % 4) for i in range(24)]
    collate = Collator(tok.pad_token_id, ImageFiles(processor, [folder/f'{i}.png' for i in range(4)]))
    stage = Stage('stage2', ('projector', 'language_model'), 1e-2, epochs=5, batch_size=4)
    def tell(r): print(r['step'], flush=True)
    rows = fit(model, samples, collate, stage, seed=3, checkpoint=folder/'state', save_s=0, report=tell, num_workers=2, validation=Validation(samples[:4], patience=20))
    torch.save(model.state_dict(), folder/'end.pt')
    (folder/'rows.json').write_text(json.dumps(rows))
'''


@pytest.mark.slow
def test_ten_kills_change_nothing(tmp_path):
    "A stage with data workers, killed ten times at random steps, ends with the weights of the undisturbed run, to the bit."
    def folder(name):
        (tmp_path/name).mkdir()
        for i, colour in enumerate(('red', 'green', 'blue', 'white')): Image.new('RGB', (24, 24), colour).save(tmp_path/name/f'{i}.png')
        return tmp_path/name
    script = tmp_path/'run.py'
    script.write_text(RUN)
    def start(f): return subprocess.Popen([sys.executable, str(script), str(f)], stdout=subprocess.PIPE, text=True, start_new_session=True)
    quiet, rough, rng = folder('quiet'), folder('rough'), random.Random(0)
    assert start(quiet).wait() == 0
    kills, seen = 0, []
    while kills < 10:
        p, more = start(rough), rng.randint(1, 3)
        for k, line in enumerate(p.stdout, 1):
            seen.append(int(line))
            if k == more: break
        else: pytest.fail(f'it ended after {kills} kills')
        os.killpg(p.pid, signal.SIGKILL); p.wait(); p.stdout.close()
        kills += 1
    assert start(rough).wait() == 0
    assert (rough/'rows.json').read_text() == (quiet/'rows.json').read_text()
    a, b = (torch.load(f/'end.pt') for f in (quiet, rough))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert max(seen) >= 10   # the kills came while it went on, not at its first step only


def test_a_killed_data_worker_is_reported(toy, tmp_path):
    samples, pad, features = toy
    def kill(row):
        if row['step'] == 1:
            for p in psutil.Process().children():
                with contextlib.suppress(psutil.Error):
                    if p.name().startswith('pt_data') or 'pytest' in ' '.join(p.cmdline()): p.kill()
    with pytest.raises(TrainingError, match='fewer of them .num_workers.'):
        fit(tiny_model(image_size=24)[0], samples*20, Collator(pad, features), STAGE, num_workers=2, report=kill)


def test_a_data_worker_that_dies_while_all_is_put_back_is_reported_too(toy, monkeypatch):
    samples, pad, features = toy
    @contextlib.contextmanager
    def interrupted(*args, **how):
        yield
        raise RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed.')
    monkeypatch.setattr(loop, 'attention_for', interrupted)
    with pytest.raises(TrainingError, match='fewer of them .num_workers.'): fit(tiny_model(image_size=24)[0], samples[:4], Collator(pad, features), STAGE)


@pytest.mark.parametrize('sharding', ['none', 'fsdp'])
def test_two_processes_agree_with_one(toy, tmp_path, sharding):
    "Also with text alone in some samples, groups that fit into memory, and an adapter."
    samples, pad, features = toy
    alone = [{k: v for k, v in s.items() if k != 'image'} | dict(input_ids=[i for i in s['input_ids'] if i != IMAGE], labels=[l for i, l in zip(s['input_ids'], s['labels']) if i != IMAGE])
             for s in samples[:5]]
    mixed = samples[:7] + alone
    for prepare in (lambda m: m, lambda m: add_lora(m, 4)):
        one, two = (prepare(tiny_model(image_size=24)[0]) for _ in range(2))
        how = dict(stage=STAGE, seed=1, memory=MemoryPlan(60, True, 0, 0, 0))
        a = fit(one, mixed, Collator(pad, features), **how)
        b = launch(2, tmp_path/'job', two, mixed, Collator(pad, features), sharding=sharding, **how)
        assert max(abs(x['loss'] - y['loss']) for x, y in zip(a, b)) < 2e-5
        assert max((x - y).abs().max().item() for x, y in zip(one.parameters(), two.parameters())) < 1e-5
        assert not (tmp_path/'job').exists()


def test_a_launched_training_that_fails_says_why(toy, tmp_path):
    samples, pad, features = toy
    bad = [dict(s, image=99) for s in samples]
    with pytest.raises(TrainingError, match='IndexError'): launch(2, tmp_path/'job', tiny_model(image_size=24)[0], bad, Collator(pad, features), STAGE)


def test_a_launched_process_that_is_killed_is_reported_and_goes_on(toy, tmp_path):
    samples, pad, features = toy
    def kill(row):
        if row['step'] == 2:
            for p in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):   # others come and go
                    if p.cmdline()[1:4] == ['-u', '-m', 'llava_med.train.launch']: p.kill(); break
    how = dict(checkpoint=tmp_path/'state', save_s=0)
    with pytest.raises(TrainingError, match='ended by itself'):
        launch(2, tmp_path/'job', tiny_model(image_size=24)[0], samples, Collator(pad, features), STAGE, report=kill, **how)
    one, two = (tiny_model(image_size=24)[0] for _ in range(2))
    seen = []
    rows = launch(2, tmp_path/'job', two, samples, Collator(pad, features), STAGE, report=seen.append, **how)
    assert seen[0]['step'] >= 2 and len(rows) == len(fit(one, samples, Collator(pad, features), STAGE))
    assert max((x - y).abs().max().item() for x, y in zip(one.parameters(), two.parameters())) < 1e-5


def test_a_full_disk_leaves_the_last_checkpoint(toy, tmp_path, monkeypatch):
    samples, pad, features = toy
    from llava_med.train import distributed
    from llava_med.core.runs import OutputError
    real, count = distributed.dcp.save, [0]
    def full(*args, **kw):
        count[0] += 1
        if count[0] == 3: raise OSError(28, 'No space left on device')
        return real(*args, **kw)
    monkeypatch.setattr(distributed.dcp, 'save', full)
    with pytest.raises(OutputError, match='free some space|space'):
        fit(tiny_model(image_size=24)[0], samples, Collator(pad, features), STAGE, checkpoint=tmp_path/'state', save_s=0)
    monkeypatch.setattr(distributed.dcp, 'save', real)
    seen = []
    rows = fit(tiny_model(image_size=24)[0], samples, Collator(pad, features), STAGE, checkpoint=tmp_path/'state', report=seen.append)
    assert seen[0]['step'] == 2 and len(rows) == 8


@pytest.mark.parametrize('module', ['batches', 'distributed', 'launch', 'loop', 'memory', 'objectives', 'samplers', 'stages'])
def test_a_function_of_training_is_read_at_one_glance(module):
    "The body of `fit`, and of every function around it, has at most forty lines."
    tree = ast.parse((REPO/f'llava_med/train/{module}.py').read_text(encoding='utf-8'))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    bodies = {f.name: f.end_lineno - f.body[0].lineno + 1 for f in functions}
    assert bodies and not {k: n for k, n in bodies.items() if n > 40}


@pytest.mark.parametrize('every, checked', [(2., [4]), (.7, [3, 4]), (.5, [2, 4]), (1., [4])])
def test_the_last_step_is_followed_by_a_check(toy, every, checked):
    "Else early stopping would put back the first weights, or those of before the end."
    samples, pad, features = toy
    model, stage = tiny_model(image_size=24)[0], Stage('toy', ('projector',), 1e-3, epochs=1, batch_size=4)
    before = model.state_dict()['model.multi_modal_projector.linear_1.weight'].clone()
    rows = fit(model, samples, Collator(pad, features), stage, validation=loop.Validation(samples[:4], every=every, patience=3))
    assert [r['step'] + 1 for r in rows if isinstance(r.get('val_loss'), float)] == checked, rows
    assert not torch.equal(before, model.state_dict()['model.multi_modal_projector.linear_1.weight'])


def test_more_patience_trains_on(toy, tmp_path):
    "A checkpoint of a training that early stopping ended is not the end of one with more patience or other checks."
    samples, pad, features = toy
    stage = Stage('toy', ('projector', 'language_model'), 1e-2, epochs=6, batch_size=4)
    wrong = [dict(s, labels=[i if l != -100 else l for i, l in zip([4]*99, s['labels'])]) for s in samples[:4]]
    def run(folder, **kw): return fit(tiny_model(image_size=24)[0], samples, Collator(pad, features), stage, checkpoint=folder, validation=loop.Validation(wrong, **kw))
    short = run(tmp_path/'state', patience=1)
    for kw in (dict(patience=3), dict(patience=1, every=.5)):
        run(tmp_path/'state', patience=1)
        assert run(tmp_path/'state', **kw) == run(None, **kw) != short
