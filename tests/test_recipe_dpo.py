"Direct preference optimization: its loss by numbers, its pairs, its reference, and its study."
import csv
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from llava_med.recipes.dpo import DPO, dpo_loss, pair_records, preferences, run_dpo
from llava_med.recipes.parts import answer_logprobs, shipped, study_world, world_samples
from llava_med.recipes.study import STUDY_COLUMNS
from llava_med.train.batches import batch_loss
from llava_med.train.distributed import micro_batches
from llava_med.train.loop import Stage, fit
from llava_med.train.objectives import OBJECTIVES
from llava_med.train.samplers import group_keys

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def world(tmp_path_factory): return study_world(2, 2, 0, tmp_path_factory.mktemp('world'))


@pytest.fixture(scope='module')
def trained(world):
    "A model after two short steps, and what it was trained with."
    model, processor = shipped()
    objective = OBJECTIVES.named('dpo')(.5)
    samples, collate = world_samples(preferences(world)[:4], world.images, model, processor, objective)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    rows = fit(model, samples, collate, Stage('dpo', 'projector', 1e-2, 2, 8, sampler='pairs'), objective=objective)
    return model, objective, samples, collate, start, rows


# The loss

def test_the_loss_by_hand():
    losses, margin = dpo_loss(*map(torch.tensor, ([-1., -2.], [-3., -2.], [-2., -2.], [-2.5, -2.])), beta=.5)
    assert torch.allclose(margin, torch.tensor([.75, 0]))
    assert torch.allclose(losses, torch.tensor([math.log(1 + math.exp(-.75)), math.log(2)]))


@pytest.mark.skipif(not importlib.util.find_spec('trl'), reason='trl is not installed')
def test_the_loss_is_that_of_trl():
    from types import SimpleNamespace
    from trl import DPOTrainer
    numbers = [torch.randn(5, generator=torch.Generator().manual_seed(i)) - 4 for i in range(4)]
    how = SimpleNamespace(beta=.3, label_smoothing=0., reference_free=False, f_divergence_type='reverse_kl', loss_type=['sigmoid'],
                          accelerator=SimpleNamespace(device='cpu'), args=SimpleNamespace(), use_weighting=False)
    if not hasattr(DPOTrainer, 'dpo_loss'): pytest.skip('this trl has no dpo_loss to call')
    theirs = DPOTrainer.dpo_loss(how, *numbers, 'sigmoid')[0]
    assert torch.allclose(dpo_loss(*numbers, .3)[0], theirs, atol=1e-6)


def test_gradients_by_finite_differences():
    "A policy over three words, of which the first is preferred to the second."
    ref = torch.tensor([.3, -.2, .5], dtype=torch.float64).log_softmax(-1)
    def f(logits):
        p = logits.log_softmax(-1)
        return dpo_loss(p[:1], p[1:2], ref[:1], ref[1:2], .7)[0].sum()
    x = torch.tensor([.1, .9, -.4], dtype=torch.float64, requires_grad=True)
    f(x).backward()
    eps, eye = 1e-6, torch.eye(3, dtype=torch.float64)
    found = [((f(x + eps*e) - f(x - eps*e))/(2*eps)).item() for e in eye]
    assert torch.allclose(x.grad, torch.tensor(found, dtype=torch.float64), atol=1e-8)
    assert torch.autograd.gradcheck(f, x)


# Pairs

RECORD = dict(id='r7', conversations=[{'from': 'human', 'value': 'q?'}, {'from': 'gpt', 'value': 'a'}], rejected='b')


@pytest.mark.parametrize('change, said', [
    (dict(rejected=''), "'r7' has no rejected answer"), (dict(rejected=None), 'no rejected'), (dict(rejected=3), 'no rejected'),
    (dict(rejected=' a '), 'is the chosen one'), (dict(conversations=[]), 'does not end'), (dict(conversations=RECORD['conversations'][:1]), 'does not end')])
def test_what_is_no_pair_is_named(change, said):
    with pytest.raises(ValueError, match=said): pair_records({**RECORD, **change})


def test_a_record_gives_two_samples_of_one_group(trained):
    samples = trained[2]
    assert [s['group'] for s in samples] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [s['chosen'] for s in samples] == [True, False]*4
    assert all(a['input_ids'] != b['input_ids'] for a, b in zip(samples[::2], samples[1::2]))


def test_a_batch_holds_whole_pairs_in_any_order(trained):
    model, objective, samples, collate, *_ = trained
    first = objective.collate(samples[:4], collate)['input_ids']
    mixed = objective.collate([samples[i] for i in (1, 0, 2, 3)], collate)['input_ids']
    assert torch.equal(first, mixed)
    with pytest.raises(ValueError, match="sampler 'pairs'"): objective.collate(samples[:3], collate)
    with pytest.raises(ValueError, match="sampler 'pairs'"): objective.collate([dict(s, group=None) for s in samples[:2]], collate)
    with pytest.raises(ValueError, match='leave `weights` out'): objective.collate([dict(s, weights=[1.]) for s in samples[:2]], collate)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match='beta is 0'): DPO(0)
    with pytest.raises(ValueError, match='beta is nan'): DPO(float('nan'))
    with pytest.raises(ValueError, match='no reference yet'): DPO().loss(None, {})


def test_the_placebo_differs_in_order_alone(world):
    plain, swapped = preferences(world, 1), preferences(world, 1, swapped=True)
    sides = lambda rs: [{r['rejected'], r['conversations'][-1]['value']} for r in rs]
    assert plain != swapped and sides(plain) == sides(swapped) and len(plain) > 8
    right = {o['id']: o['answer'] for o in world.train_items}
    assert all(r['conversations'][-1]['value'] == right[r['id']] for r in plain)


# Training

def test_it_starts_at_log_two_and_the_margin_grows(trained):
    rows = trained[-1]
    assert abs(rows[0]['loss'] - math.log(2)) < 1e-4 and rows[0]['margin'] == 0
    assert rows[-1]['loss'] < rows[0]['loss'] and rows[-1]['margin'] > 0


def test_the_reference_stays_where_it_was(trained):
    model, objective, *_, start, _ = trained
    assert all(torch.equal(v, start[k]) for k, v in objective.modules()['reference'].state_dict().items())
    assert not any(p.requires_grad for p in objective.reference.parameters())
    assert any(not torch.equal(v, start[k]) for k, v in model.state_dict().items())


def test_micro_batches_change_nothing(trained):
    model, objective, samples, collate, *_ = trained
    with torch.no_grad():
        whole = objective.loss(model, objective.collate(samples, collate))
        lengths = [objective.length(s) for s in samples]
        parts = micro_batches(range(8), lengths, 2*max(lengths), unit='group', keys=group_keys(samples))
        found = [objective.loss(model, objective.collate([samples[j] for j in p], collate)) for p in parts]
    assert len(parts) == 4 and sum(n for _, n, _ in found) == whole[1] == 4
    assert abs(sum(x.item() for x, *_ in found) - whole[0].item()) < 1e-4
    assert abs(sum(l['margin'].item() for *_, l in found) - whole[2]['margin'].item()) < 1e-4


def test_the_log_probability_of_an_answer_is_that_of_plain_cross_entropy(trained):
    model, _, samples, collate, *_ = trained
    batch = collate(samples[:3])
    with torch.no_grad():
        total, _ = batch_loss(model, batch)
        own = answer_logprobs(model, batch)
        alone = [answer_logprobs(model, collate([s]))[0] for s in samples[:3]]
    assert torch.allclose(own, torch.stack(alone), atol=1e-4) and abs(own.sum() + total) < 1e-3
    with pytest.raises(ValueError, match='neither packed nor shared'): answer_logprobs(model, dict(batch, positions=batch['labels']))


@pytest.mark.slow
def test_an_arm_is_trained_and_asked(world):
    result = run_dpo(dict(name='dpo', objective='dpo'), 0, dict(lr=3e-4, epochs=1, pairs=8), world)
    assert len(result.credits) == len(world.items) and result.steps == -(-len(preferences(world))//8)


@pytest.mark.slow
def test_the_study_ends_with_a_table(tmp_path):
    env = {**os.environ, 'LLAVA_MED_OUTPUTS': str(tmp_path), 'LLAVA_MED_ROOT': str(REPO), 'PYTHONPATH': str(REPO), 'OMP_NUM_THREADS': '1'}
    words = [sys.executable, '-m', 'papermill', '-k', 'python3', REPO/'nbs/recipes/preference/dpo_study.ipynb', tmp_path/'out.ipynb']
    done = subprocess.run(list(map(str, words)), cwd=REPO, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with open(tmp_path/'scratch/dpo_smoke/study.csv', newline='') as f: rows = list(csv.DictReader(f))
    assert tuple(rows[0]) == STUDY_COLUMNS
    assert [r['verdict'] for r in rows if r['row'] == 'dpo-cross_entropy'] != ['']
