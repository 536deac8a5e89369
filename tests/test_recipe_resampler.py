"A query resampler: trained in two stages, saved, loaded, and asked on both paths with equal answers; its study runs."
import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from llava_med.generate.answers import answer, plain_answer, slow_because
from llava_med.lab.presets import plan_run, read_preset
from llava_med.models.anatomy import connector, image_tokens
from llava_med.models.connectors import put_connector
from llava_med.models.llava import load, save, tiny_model
from llava_med.recipes.parts import caption_records, measured_fit, shipped, study_world, total_cost, world_samples
from llava_med.recipes.resampler import MeanPool, Resampler, run_resampler
from llava_med.recipes.study import STUDY_COLUMNS
from llava_med.train.loop import Stage

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def world(tmp_path_factory): return study_world(4, 3, 0, tmp_path_factory.mktemp('world'))


def test_one_look_is_attention_by_hand():
    "With the norms and the MLP out of the way, a layer is softmax(q k / sqrt(d)) v over features and queries."
    layer = Resampler(8, 4, 6, queries=2, heads=1).layers[0].eval()
    q, x = torch.randn(1, 2, 4), torch.randn(1, 6, 4)
    wq, wk, wv = layer.attend.in_proj_weight.chunk(3)
    asked, seen = layer.norm_queries(q), torch.cat([layer.norm_features(x), layer.norm_queries(q)], 1)
    shares = (asked @ wq.T @ (seen @ wk.T).transpose(1, 2)/2).softmax(-1)
    found = q + F.linear(shares @ (seen @ wv.T), layer.attend.out_proj.weight, layer.attend.out_proj.bias)
    assert torch.allclose(layer(q, x), found + layer.mlp(found), atol=1e-5)


@pytest.mark.parametrize('cls', [Resampler, MeanPool])
def test_sizes_and_refusals(cls):
    for n in (1, 4, 16): assert cls(8, 12, 16, queries=n)(torch.randn(3, 16, 8)).shape == (3, n, 12)
    with pytest.raises(ValueError, match='queries'): cls(8, 12, 16, queries=0)
    model, processor = tiny_model()
    before = connector(model)
    for options, said in ((dict(queries=-1), 'queries'), (dict(querys=3), 'cannot be built'), (dict(heads=5) if cls is Resampler else dict(queries=7), 'choose')):
        with pytest.raises(ValueError, match=said): put_connector(model, processor, 'resampler' if cls is Resampler else 'mean_pool', **options)
    assert connector(model) is before and image_tokens(model) == 64


def test_queries_do_not_mind_the_order_of_features_and_means_do():
    x, order = torch.randn(2, 16, 8), torch.arange(15, -1, -1)
    a, b = Resampler(8, 12, 16, queries=4, depth=2), MeanPool(8, 12, 16, queries=4)
    assert torch.allclose(a(x), a(x[:, order]), atol=1e-5) and not torch.allclose(b(x), b(x[:, order]), atol=1e-3)


@pytest.mark.parametrize('name', ['resampler', 'mean_pool'])
def test_it_is_trained_saved_loaded_and_asked_on_both_paths(name, world, tmp_path):
    model, processor = shipped()
    put_connector(model, processor, name, queries=8)
    start = {n: p.detach().clone() for n, p in connector(model).named_parameters()}
    stages = [(caption_records(world), Stage('stage1', ('projector',), 2e-3, 2, 4)),
              (world.records, Stage('stage2', ('projector', 'language_model'), 1e-3, 1, 16))]
    for records, stage in stages:
        samples, collate = world_samples(records, world.images, model, processor)
        assert all(s['input_ids'].count(model.config.image_token_id) == 8 for s in samples)
        cost = measured_fit(model, samples, collate, stage)
        moved = {n for n, p in connector(model).named_parameters() if not torch.equal(p, start[n])}
        assert moved == set(start), set(start) - moved   # queries, too
    learned = sum(p.numel() for n, p in model.named_parameters() if 'vision_tower' not in n)
    assert cost['params'] == learned
    shown, asked = [world.images/o['images'][0] for o in world.items], [o['question'] for o in world.items]
    said = answer(model, processor, shown, asked, max_new_tokens=6)
    assert slow_because(model) is None and len(set(said)) > 1
    assert plain_answer(model, processor, shown, asked, max_new_tokens=6) == said
    again = load(save(model, processor, tmp_path/'m'))
    assert type(connector(again[0])) is type(connector(model)) and image_tokens(again[0]) == 8
    for a, b in zip(connector(model).parameters(), connector(again[0]).parameters()): assert torch.equal(a, b)
    assert answer(*again, shown, asked, max_new_tokens=6) == said == plain_answer(*again, shown, asked, max_new_tokens=6)


def test_a_saved_resampler_is_found_by_a_process_that_has_not_imported_it(tmp_path):
    "The record of the connector names its module, which `load` imports."
    model, processor = tiny_model(connector='resampler')
    save(model, processor, tmp_path/'m')
    code = "import sys; from llava_med.models.llava import load; from llava_med.models.anatomy import connector; print(type(connector(load(sys.argv[1])[0])).__name__)"
    done = subprocess.run([sys.executable, '-c', code, tmp_path/'m'], capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(REPO)})
    assert done.stdout.split()[-1:] == ['Resampler'], done.stderr[-500:]


def test_arms_differ_in_the_connector_alone(world):
    sizes = dict(epochs1=1, lr1=2e-3, epochs=1, lr=1e-3)
    arms = {n: run_resampler(dict(connector=n), 0, sizes, world) for n in ('mlp', 'resampler', 'mean_pool')}
    assert len({r.steps for r in arms.values()}) == 1 and all(r.clusters == arms['mlp'].clusters for r in arms.values())
    assert arms['resampler'].tokens == arms['mean_pool'].tokens < arms['mlp'].tokens
    leaked = run_resampler(dict(connector='mlp', leak=True), 0, sizes, world)
    assert leaked.steps > arms['mlp'].steps


def test_captions_of_training_images_only_and_the_cost_of_two_stages(world):
    said = caption_records(world)
    assert [r['image'] for r in said] == list(dict.fromkeys(r['image'] for r in world.records))
    assert not {r['image'] for r in said} & {n for o in world.items for n in o['images']}
    a, b = dict(steps=1, tokens=10, train_s=.5, params=3), dict(steps=2, tokens=20, train_s=1., params=2)
    assert total_cost(a, b) == dict(steps=3, tokens=30, train_s=1.5, params=3)


def test_a_preset_can_name_the_study_as_a_step(tmp_path):
    (tmp_path/'p.yaml').write_text('description: x\nrecipes: [llava_med.recipes.resampler]\n'
                                   'steps: [{name: resampler, notebook: recipes/connectors/resampler_study, size: smoke}]\n')
    preset = read_preset(str(tmp_path/'p.yaml'))
    assert preset['recipes'] == ['llava_med.recipes.resampler'] and preset['notebooks'] == {'resampler': 'recipes/connectors/resampler_study'}
    assert plan_run(preset, 'mine')['resampler']['size'] == 'smoke'


@pytest.mark.slow
def test_the_study_runs_and_writes_its_table(tmp_path):
    env = {**os.environ, 'LLAVA_MED_ROOT': str(REPO), 'PYTHONPATH': str(REPO), 'OMP_NUM_THREADS': '1', 'LLAVA_MED_OUTPUTS': str(tmp_path)}
    words = ['-m', 'papermill', '-k', 'python3', REPO/'nbs/recipes/connectors/resampler_study.ipynb', tmp_path/'out.ipynb', '-p', 'run', 'mine']
    done = subprocess.run([sys.executable, *map(str, words)], cwd=REPO, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with open(tmp_path/'mine/resampler_smoke/study.csv', newline='') as f: rows = list(csv.DictReader(f))
    assert tuple(rows[0]) == STUDY_COLUMNS
    assert {r['row'] for r in rows} == {'base', 'resampler', 'mean_pool', 'test_answers', 'resampler-base', 'mean_pool-base', 'test_answers-base', 'resampler-mean_pool'}
    assert [r['verdict'] for r in rows if r['row'] == 'resampler-base'] != ['']


def few_steps(way, folder=None):
    "Losses of a few steps with the resampler in a tiny model, taken here, with a helper, or in two processes."
    from llava_med.models.llava import tiny_model
    from llava_med.train.batches import Collator, encode
    from llava_med.train.launch import launch
    from llava_med.train.loop import Stage, fit
    model, processor = tiny_model(image_size=24)
    put_connector(model, processor, 'resampler', queries=3)
    tok, n = processor.tokenizer, model.config.image_seq_length
    chat = lambda w: [dict(role='user', content=[dict(type='image'), dict(type='text', text='?')]), dict(role='assistant', content=w)]
    samples = [dict(encode(tok, chat(w), n), image=i) for i, w in enumerate('abcdefgh')]
    collate = Collator(tok.pad_token_id, torch.randn(8, 4, 32, generator=torch.manual_seed(0)))
    stage = Stage('stage1', ('projector',), 1e-2, epochs=2, batch_size=4)
    if way == 'launch': rows = launch(2, folder/'job', model, samples, collate, stage)
    else: rows = fit(model, samples, collate, stage, grad_workers=2 if way == 'helper' else 1)
    return [r['loss'] for r in rows], [p.detach().clone() for p in model.model.multi_modal_projector.parameters()]


@pytest.mark.parametrize('way', ['helper', 'launch'])
def test_other_processes_get_the_connector_too(way, tmp_path):
    (losses, weights), (others, same) = few_steps('alone'), few_steps(way, tmp_path)
    assert max(abs(a - b) for a, b in zip(losses, others)) < 1e-4
    for a, b in zip(weights, same): assert (a - b).norm() < 1e-3*(1 + a.norm())
