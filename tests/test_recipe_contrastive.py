"A contrastive vision encoder: the loss of a whole batch, equal over two processes; what learns; its study runs."
import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from llava_med.lab.presets import plan_run, read_preset
from llava_med.models.anatomy import set_trainable, tower, trainable_names
from llava_med.models.llava import load, save, tiny_model
from llava_med.recipes.contrastive import MAX_LOG_SCALE, Contrastive, caption_recall, run_contrastive
from llava_med.recipes.parts import caption_records, study_world, world_samples
from llava_med.recipes.study import STUDY_COLUMNS
from llava_med.train.launch import launch
from llava_med.train.loop import Stage, fit
from llava_med.train.memory import MemoryPlan
from llava_med.train.objectives import load_modules, objective_name, save_modules

REPO = Path(__file__).resolve().parents[1]
STAGE = Stage('contrastive', ('used_tower',), 1e-2, epochs=2, batch_size=8, optimizer='sgd', max_grad_norm=1e9, objective='contrastive')


@pytest.fixture(scope='module')
def world(tmp_path_factory): return study_world(8, 3, 0, tmp_path_factory.mktemp('world'))


def objective(model, **more):
    "An objective that has its towers."
    o = Contrastive(**more)
    o.start(model)
    return o


def short(world): return [dict(r, conversations=[r['conversations'][0], {'from': 'gpt', 'value': 'left right up down near far in out'.split()[i]}]) for i, r in enumerate(caption_records(world))]


def toy(world, **more):
    "A tiny model, its objective, samples with pixels, and their collator."
    model, processor = tiny_model(image_size=24)
    o = objective(model, **more)
    return model, o, *world_samples(short(world), world.images, model, processor, o, pixels=True)


def trained(world, how=None, **more):
    "Rows and what learned, after two steps in this process."
    model, o, samples, collate = toy(world)
    rows = fit(model, samples, collate, STAGE, objective=o, memory=how, **more)
    return rows, [*tower(model).parameters(), *o.towers.parameters()]


def same(world, a, b):
    "Losses equal to 1e-5 of themselves, and what was learned to 1e-5 of what changed, up to the weights' own rounding."
    for x, y in zip(a[0], b[0]): assert abs(x['loss'] - y['loss']) <= 1e-5*abs(x['loss']) + 1e-5 and x['recall'] == y['recall']   # rows have five decimals
    model, o, *_ = toy(world)
    begin = [*tower(model).parameters(), *o.towers.parameters()]
    assert sum(not torch.equal(x, s) for x, s in zip(a[1], begin)) > len(begin)//2
    for x, y, s in zip(a[1], b[1], begin): assert (x - y).norm() <= 1e-5*(x - s).norm() + 1e-7*x.norm() + 1e-8   # a bias of keys has no gradient but rounding


def test_the_loss_is_the_one_by_hand_and_is_never_divided(world):
    model, o, samples, collate = toy(world)
    batch = collate(samples)
    with torch.no_grad():
        total, n, logs = o.loss(model, batch)
        images, texts = o.vectors(model, batch)
        c, own = (o.towers.log_scale.exp()*images @ texts.T).log_softmax(1), torch.arange(8)
        by_hand = -(c.diagonal() + (o.towers.log_scale.exp()*texts @ images.T).log_softmax(1).diagonal()).sum()/2
    assert n == 8 and torch.allclose(total, by_hand, rtol=1e-5) and logs['recall'] == (c.argmax(1) == own).sum()
    whole = trained(world)
    most = max(len(s['input_ids']) for s in samples)*8
    same(world, whole, trained(world, MemoryPlan(most, False, 0, 0, 0)))
    with pytest.raises(ValueError, match='A batch of this objective has .* may not be divided'): trained(world, MemoryPlan(most - 1, False, 0, 0, 0))


@pytest.mark.slow
def test_two_processes_end_as_one(world, tmp_path, monkeypatch):
    monkeypatch.setenv('PYTHONPATH', str(REPO))
    model, o, samples, collate = toy(world)
    rows = launch(2, tmp_path/'job', model, samples, collate, STAGE, objective=o)
    same(world, trained(world), (rows, [*tower(model).parameters(), *o.towers.parameters()]))


def test_weights_that_features_do_not_depend_on_stay_out(world):
    model, _ = tiny_model(image_size=24)
    before = [p.requires_grad for p in model.parameters()]
    used, every = set(trainable_names(model, ['used_tower'])), set(trainable_names(model, ['vision_tower']))
    assert {n.rpartition('.')[0] for n in every - used} == {'model.vision_tower.post_layernorm'}
    assert [p.requires_grad for p in model.parameters()] == before
    model.config.vision_feature_layer = -2   # LLaVA's: the last layer is not read
    assert {n.split('layers.')[1][0] for n in set(trainable_names(model, ['used_tower'])) ^ used} == {'1'}
    set_trainable(model, ['used_tower'])
    _, o, samples, collate = toy(world)
    o.loss(model, collate(samples))[0].backward()
    learn = [*o.towers.parameters(), *(p for p in model.parameters() if p.requires_grad)]
    assert all(p.grad is not None for p in learn)


def test_it_learns_and_what_learned_is_saved(world, tmp_path):
    model, o, samples, collate = toy(world)
    stage = Stage('contrastive', ('used_tower',), 3e-3, epochs=30, batch_size=8, objective='contrastive')
    fit(model, samples, collate, stage, objective=o)
    found = caption_recall(model, o, samples, collate)
    assert sum(found) >= 5 and o.towers.log_scale <= MAX_LOG_SCALE and objective_name(o) == 'contrastive'
    save_modules(o, tmp_path/'modules.safetensors')
    processor = tiny_model(image_size=24)[1]
    again = load(save(model, processor, tmp_path/'m'))[0]
    other = objective(again, seed=5)
    load_modules(other, tmp_path/'modules.safetensors')
    assert caption_recall(again, other, samples, collate) == found


def test_the_scale_is_held(world):
    model, o, *_ = toy(world)
    with torch.no_grad(): o.towers.log_scale.fill_(9.)
    o.after_step(model, 0)
    assert o.towers.log_scale.item() == pytest.approx(MAX_LOG_SCALE)


def test_a_name_is_enough(world):
    "As in a preset: the objective makes its towers itself."
    model, o, samples, collate = toy(world)
    assert len(fit(model, samples, collate, STAGE)) == 2


def test_captions_shuffled_are_all_anothers(world):
    _, _, samples, _ = toy(world)
    _, _, mixed, _ = toy(world, shuffled=True)
    assert [s['image'] for s in mixed] == [s['image'] for s in samples]
    assert sorted(s['input_ids'] for s in mixed) == sorted(s['input_ids'] for s in samples)
    assert not any(a['input_ids'] == b['input_ids'] for a, b in zip(samples, mixed))


@pytest.mark.parametrize('change, said', [
    (lambda rs: rs + rs[2:3], "Record 'TR.*2': its image 'TR.*2.jpg' has a caption already"),
    (lambda rs: [dict(rs[0], image=None, conversations=[{'from': 'human', 'value': 'hi'}, {'from': 'gpt', 'value': 'yes'}])], 'has not exactly one image'),
    (lambda rs: [dict(rs[0], image=[rs[0]['image'], rs[1]['image']], conversations=[{'from': 'human', 'value': '<image><image>hi'}, {'from': 'gpt', 'value': 'yes'}])], 'has not exactly one image')])
def test_records_that_are_no_pairs_are_refused(world, change, said):
    model, processor = tiny_model(image_size=24)
    with pytest.raises(ValueError, match=said): world_samples(change(short(world)), world.images, model, processor, Contrastive())


def test_a_long_caption_is_cut_and_said_so(world, capsys):
    model, processor = tiny_model(image_size=24)
    long = dict(short(world)[0], conversations=[{'from': 'human', 'value': '<image>\nhi'}, {'from': 'gpt', 'value': 'zq '*200}])
    samples, _ = world_samples([long], world.images, model, processor, 'contrastive')
    assert len(samples[0]['input_ids']) == 128 and '1 of 1 captions are cut at 128 tokens' in capsys.readouterr().out


def test_the_arms(world):
    sizes = dict(epochs1=1, lr1=1e-4, epochs=1, lr=1e-3)
    base, idea, leaked = (run_contrastive(a, 0, sizes, world) for a in ({}, dict(contrastive=True), dict(leak=True)))
    assert idea.steps == base.steps + 1 and idea.clusters == base.clusters and leaked.steps > base.steps


def test_a_preset_can_name_the_study_as_a_step(tmp_path):
    (tmp_path/'p.yaml').write_text('description: x\nrecipes: [llava_med.recipes.contrastive]\n'
                                   'steps: [{name: contrastive, notebook: recipes/encoders/contrastive_study, size: smoke}]\n')
    preset = read_preset(str(tmp_path/'p.yaml'))
    assert preset['recipes'] == ['llava_med.recipes.contrastive'] and preset['notebooks'] == {'contrastive': 'recipes/encoders/contrastive_study'}
    assert plan_run(preset, 'mine')['contrastive']['size'] == 'smoke'


@pytest.mark.slow
def test_the_study_runs_and_writes_its_table(tmp_path):
    env = {**os.environ, 'LLAVA_MED_ROOT': str(REPO), 'PYTHONPATH': str(REPO), 'OMP_NUM_THREADS': '1', 'LLAVA_MED_OUTPUTS': str(tmp_path)}
    words = ['-m', 'papermill', '-k', 'python3', REPO/'nbs/recipes/encoders/contrastive_study.ipynb', tmp_path/'out.ipynb', '-p', 'run', 'mine']
    done = subprocess.run([sys.executable, *map(str, words)], cwd=REPO, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with open(tmp_path/'mine/contrastive_smoke/study.csv', newline='') as f: rows = list(csv.DictReader(f))
    assert tuple(rows[0]) == STUDY_COLUMNS
    assert {r['row'] for r in rows} >= {'base', 'contrastive', 'shuffled_captions', 'test_answers', 'contrastive-base', 'contrastive-shuffled_captions'}
    assert [r['verdict'] for r in rows if r['row'] == 'contrastive-base'] != ['']
