"What the cells of subjects and conditions cannot say: kills, several processes, sets of several images, names of models."
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import REPO
from llava_med.core.registry import UnknownName
from llava_med.core.runs import read_jsonl, write_json
from llava_med.evaluate import subjects
from llava_med.evaluate.conditions import CONDITIONS, Pool, condition_images
from llava_med.evaluate.subjects import KEY, ModelError, find_models, predict, settled
from llava_med.models.llava import tiny_model
from test_answers import QUESTIONS, loud, quilt


# The log

def world(folder, n_images=30, n_questions=8):
    rng, items = np.random.default_rng(0), []
    for i in range(n_images):
        quilt(rng).save(folder/f'{i}.png')
        items += [dict(id=f'{i}-{j}', images=[f'{i}.png'], question=f'{QUESTIONS[j % 4]} {j}', patient=f'p{i}') for j in range(n_questions)]
    return items


def evaluate(folder, log, asked_fn=None, items=None):
    "An evaluation as a script would do it; every question that reaches the model is noted before it is answered."
    torch.set_num_threads(1)
    model, processor = tiny_model()
    loud(model)
    items = items or json.loads((folder/'items.json').read_text())
    if asked_fn:
        def noting(self, items, pictures, *a, _generate=subjects.LocalModel.generate, **kw):
            names = ['image' if p[0].name == o['images'][0] else 'shuffled' for o, p in zip(items, pictures)]
            with open(asked_fn, 'a') as f: f.write(''.join(f"{c} {o['id']}\n" for c, o in zip(names, items))); f.flush(); os.fsync(f.fileno())
            return _generate(self, items, pictures, *a, **kw)
        subjects.LocalModel.generate = noting
    return [predict(model, processor, items, folder, log, 'tiny', c, max_new_tokens=8, batch_size=1) for c in ('image', 'shuffled')]


def final(log, done):
    return [{k: v for k, v in r.items() if k != 'seconds'} for r in settled(log, done)]


def questions_of(asked_fn): return [tuple(l.split()) for l in asked_fn.read_text().splitlines()] if asked_fn.exists() else []


def test_ten_kills_lose_nothing(tmp_path, forks):
    items = world(tmp_path)
    (tmp_path/'items.json').write_text(json.dumps(items))
    context = forks('test_subjects')
    log, asked_fn, rng = tmp_path/'killed.jsonl', tmp_path/'asked.txt', random.Random(5)
    for kill in range(10):
        before, start = read_complete(log), len(questions_of(asked_fn))
        p = context.Process(target=evaluate, args=(tmp_path, log, asked_fn))
        p.start()
        wanted, until = len(before) + rng.randint(4, 30), time.monotonic() + 60
        while p.is_alive() and len(read_complete(log)) < wanted and time.monotonic() < until: time.sleep(.002)
        time.sleep(rng.random()*.03)
        assert p.is_alive(), 'the evaluation ended before it was killed'
        os.kill(p.pid, signal.SIGKILL)
        p.join()
        now = questions_of(asked_fn)[start:]
        assert now and not set(now) & set(before), f'kill {kill}: a stored answer was generated again'
    before, start = read_complete(log), len(questions_of(asked_fn))
    assert 40 <= len(before) < 2*len(items)
    p = context.Process(target=evaluate, args=(tmp_path, log, asked_fn))
    p.start(); p.join()
    assert p.exitcode == 0
    assert sorted(questions_of(asked_fn)[start:]) == sorted({(c, o['id']) for c in ('image', 'shuffled') for o in items} - set(before))
    done = evaluate(tmp_path, log, items=items)
    assert [d['asked'] for d in done] == [0, 0]
    undisturbed = tmp_path/'undisturbed.jsonl'
    assert final(log, done) == final(undisturbed, evaluate(tmp_path, undisturbed, items=items))
    keys = [tuple(r[k] for k in KEY) for r in read_jsonl(log)]
    assert len(keys) == len(set(keys)) == 2*len(items)


def read_complete(log):
    "(condition, item) of the lines that are whole."
    if not log.exists(): return []
    return [(r['condition'], r['item']) for r in map(json.loads, log.read_bytes().split(b'\n')[:-1])]


def test_a_line_torn_anywhere_is_asked_again(tmp_path):
    items, log = world(tmp_path, 2, 2), tmp_path/'log.jsonl'
    items[3]['question'] += ' é'   # two bytes
    model, processor = tiny_model()
    def run(): return predict(model, processor, items, tmp_path, log, 'tiny', max_new_tokens=2)
    want, whole = final(log, [run()]), log.read_bytes()
    last = whole[:-1].rfind(b'\n') + 1
    for cut in sorted({last + 1, last + 2, len(whole) - 1, *range(last + 3, len(whole), 97), whole.rfind('é'.encode()) + 1}):
        log.write_bytes(whole[:cut])
        done = run()
        assert (done['asked'], done['before']) == (1, 3) and final(log, [done]) == want
    log.write_bytes(whole[:last])
    assert run()['asked'] == 1


def test_faults_are_lines_with_errors(tmp_path):
    items, log = world(tmp_path, 6, 3), tmp_path/'log.jsonl'
    (tmp_path/'2.png').write_bytes(b'this is no picture')
    del items[4]['question']
    model, processor = tiny_model()
    done = predict(model, processor, items, tmp_path, log, 'tiny', max_new_tokens=2)
    rows = {r['item']: r for r in settled(log, [done])}
    bad = {i for i, r in rows.items() if r['error']}
    assert len(rows) == 18 and bad == {'2-0', '2-1', '2-2', '1-1'} and done['errors'] == 4
    assert all(rows[i]['text'] is None for i in bad) and 'question' in rows['1-1']['error'] and '2.png' in rows['2-0']['error']
    assert all(isinstance(r['text'], str) for i, r in rows.items() if i not in bad)
    with pytest.raises(ValueError, match='lacks 1 of 19 answers'):
        settled(log, [done, dict(done, keys=[tuple(['nobody'] + list(done['keys'][0][1:]))])])


# Several processes

SCRIPT = '''
import sys; sys.path[:0] = [{tests!r}]
import json, os
from pathlib import Path
from test_subjects import evaluate
done = evaluate(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[2] + '.asked' + os.environ.get('RANK', '')))
Path(sys.argv[2] + '.done' + os.environ.get('RANK', '')).write_text(json.dumps(done))
'''


def together(folder, log, n=2):
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    def one(rank):
        env = dict(os.environ, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port),
                   ACCELERATE_USE_CPU='true', OMP_NUM_THREADS='1', PYTHONPATH=str(REPO), GLOO_SOCKET_IFNAME='lo')
        return subprocess.Popen([sys.executable, '-c', SCRIPT.format(tests=str(REPO/'tests')), str(folder), str(log)], env=env,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return [one(r) for r in range(n)]


def test_two_processes_share_the_work(tmp_path):
    items = world(tmp_path, 10, 4)
    (tmp_path/'items.json').write_text(json.dumps(items))
    alone_fn, log = tmp_path/'alone.jsonl', tmp_path/'both.jsonl'
    one = evaluate(tmp_path, alone_fn, items=items)
    lines = [json.dumps(r) + '\n' for r in read_jsonl(alone_fn)]
    (tmp_path/'both.part1.jsonl').write_text(''.join(lines[:6]) + lines[6][:50])   # a process of an earlier attempt was killed
    work = together(tmp_path, log)
    out = [p.communicate(timeout=120) for p in work]
    assert [p.returncode for p in work] == [0, 0], out
    asked = [questions_of(tmp_path/f'both.jsonl.asked{r}') for r in range(2)]
    assert all(len(a) >= 20 for a in asked) and len(asked[0] + asked[1]) == 2*len(items) - 6, 'both worked, and nothing was asked twice'
    done = [json.loads((tmp_path/f'both.jsonl.done{r}').read_text()) for r in range(2)]
    assert [d['asked'] for d in done[0]] == [len(items) - 6, len(items)] and all(d['errors'] == 0 for d in done[0] + done[1])
    assert final(log, done[0]) == final(log, done[1]) == final(alone_fn, one)
    assert not list(tmp_path.glob('*.part*')) and len(read_jsonl(log)) == 2*len(items)


def test_a_repeated_step_keeps_its_answers(tmp_path):
    from llava_med.core.runs import clear_folder
    for name in ('.answers.jsonl', 'predictions.jsonl', 'scores.csv'): (tmp_path/name).write_text('{}\n')
    clear_folder(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['.answers.jsonl']


# Conditions

def old_condition(name, condition, images_dir, swap, seed):
    "What was shown before conditions were functions: the demo's answers are of these images."
    if condition == 'image': return images_dir/name
    if condition == 'shuffled': return images_dir/swap[name]
    if condition == 'blank': return Image.new('RGB', (96, 96), (128, 128, 128))
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8))


@pytest.mark.parametrize('condition', ['image', 'blank', 'shuffled', 'noise'])
def test_the_four_conditions_show_what_they_always_showed(tmp_path, condition):
    items = world(tmp_path, 6, 3)
    pool = Pool(items, tmp_path, 3)
    for o in items:
        (now,), before = condition_images(o, condition, pool), old_condition(o['images'][0], condition, tmp_path, pool.partners, 3)
        assert now == before if condition in ('image', 'shuffled') else now.tobytes() == before.tobytes()


def test_questions_about_one_image_share_its_noise(tmp_path):
    items = world(tmp_path, 3, 4)
    shown = subjects._shown(items, 'noise', Pool(items, tmp_path))
    assert len({id(v[0]) for v in shown.values()}) == 3   # so that a model reads it once


def test_one_of_two_images_is_swapped(tmp_path):
    items = world(tmp_path, 8, 1)
    pairs = [dict(a, id=f'{i}', images=[*a['images'], *b['images']], patient=f'p{i}') for i, (a, b) in enumerate(zip(items[::2], items[1::2]))]
    @CONDITIONS.register('first_swapped')
    def first_swapped(images, item, pool, rng):
        other = pool.others(item)[rng.integers(len(pool.others(item)))]
        return [pool.images_dir/other['images'][0], *images[1:]]
    try:
        model, processor = tiny_model()
        done = predict(loud(model), processor, pairs, tmp_path, tmp_path/'log.jsonl', 'tiny', 'first_swapped', max_new_tokens=2)
        shown = subjects._shown(pairs, 'first_swapped', Pool(pairs, tmp_path))
    finally: del CONDITIONS['first_swapped']
    assert done['errors'] == 0 and {r['condition'] for r in settled(tmp_path/'log.jsonl', [done])} == {'first_swapped'}
    for o in pairs:
        assert shown[o['id']][1].name == o['images'][1] and shown[o['id']][0].name not in o['images']


def test_an_unknown_condition_is_refused_before_anything_is_asked(tmp_path):
    items = world(tmp_path, 2, 1)
    with pytest.raises(UnknownName, match="There is no condition named 'blnk'. Did you mean blank"): predict(*tiny_model(), items, tmp_path, tmp_path/'log.jsonl', 'tiny', 'blnk')
    assert not (tmp_path/'log.jsonl').exists()


# Models by name

@pytest.fixture
def run(tmp_path):
    "A run with a model of a step that is called dpo, and a model folder elsewhere."
    for folder in (tmp_path/'outputs/mine/dpo/model', tmp_path/'elsewhere'): folder.mkdir(parents=True); write_json(folder/'config.json', {})
    return tmp_path


def test_a_name_stands_for_a_step_a_folder_or_a_server(run):
    got = find_models({'dpo': 'dpo', 'theirs': str(run/'elsewhere'), 'served': 'https://x.org/v1  big model'}, ['none', 'mine'], [['dpo', 'theirs']])
    assert got == {'dpo': ('step', 'dpo'), 'theirs': ('folder', run/'elsewhere'), 'served': ('endpoint', 'https://x.org/v1', 'big model')}


@pytest.mark.parametrize('models, pairs, why', [
    ({'dpo': 'dpp'}, [], "'dpp'.*neither such a step with a model in mine nor such a folder.*Steps with a model: dpo"),
    ({'dpo': ''}, [], 'neither such a step'), ({'dpo': '../mine/dpo'}, [], 'neither such a step'),
    ({'my-dpo': 'dpo'}, [], "'my-dpo' is no name"), ({'always_dpo': 'dpo'}, [], 'kept for guessers'),
    ({'dpo': 'http://localhost:1/v1'}, [], 'name of the model'),
    ({'dpo': 'dpo'}, [['dpo', 'base']], "no model named 'base' among those asked. Known: dpo"),
    ({'dpo': 'dpo'}, [['dpo']], 'does not name two models'), ({'dpo': 'dpo'}, ['dpo'], 'does not name two models'),
    ({}, [['stage2', 'stage3']], "no model named 'stage3' among those asked. Known: base, stage1, stage2")])
def test_models_and_pairs_that_do_not_exist_are_refused(run, models, pairs, why):
    with pytest.raises(ModelError, match=why): find_models(models, ['mine'], pairs)


def test_the_tuned_model_joins_where_there_is_one(run):
    assert list(find_models({}, ['mine'])) == ['base', 'stage1', 'stage2']
    (run/'outputs/mine/3b_vqa_tuning/model').mkdir(parents=True)
    assert list(find_models({}, ['mine'])) == ['base', 'stage1', 'stage2', 'tuned']
