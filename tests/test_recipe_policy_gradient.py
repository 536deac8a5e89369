"Policy gradient: advantages and gradients by hand, own answers as samples, a reward that rises, and its study."
import csv
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from llava_med.core.registry import UnknownName
from llava_med.generate.sampling import sample
from llava_med.recipes.parts import answer_logprobs, shipped, study_world, world_samples
from llava_med.recipes.policy_gradient import PolicyGradient, advantages, run_policy_gradient, said_sample
from llava_med.recipes.study import STUDY_COLUMNS
from llava_med.train.loop import Stage, fit
from llava_med.train.objectives import as_objective

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def world(tmp_path_factory): return study_world(8, 2, 0, tmp_path_factory.mktemp('world'), question_types=('presence',))


@pytest.fixture(scope='module')
def made(world):
    "A model, its objective, encoded prompts, a collator, and answers to three of them."
    model, processor = shipped()
    objective = PolicyGradient(processor, world.train_items, world.images, n=4)
    samples, collate = world_samples(world.records, world.images, model, processor, objective)
    return model, processor, objective, samples, collate, objective.rollout(model, samples[:3], 5)


# By hand

def test_advantages_by_hand():
    assert np.allclose(advantages([[1, 0, 0, 0], [1, 1, 1, 1]]), [[.75, -.25, -.25, -.25], [0]*4])


def test_the_mean_of_all_groups_is_the_exact_gradient():
    "A bandit of three answers: every group of three, weighed by its probability."
    reward, n = np.array([.9, .1, .4]), 3
    logits = torch.tensor([.2, -.3, .6], dtype=torch.float64, requires_grad=True)
    logp = logits.log_softmax(-1)
    exact = torch.autograd.grad((logp.exp()*torch.tensor(reward)).sum(), logits, retain_graph=True)[0]
    total = torch.zeros(3, dtype=torch.float64)
    for group in product(range(3), repeat=n):
        a = torch.tensor(advantages([reward[list(group)]])[0])
        g = torch.autograd.grad((a*logp[list(group)]).sum()/n, logits, retain_graph=True)[0]
        total += logp.detach().exp()[list(group)].prod()*g
    assert torch.allclose(total, exact*(n - 1)/n, atol=1e-12)


def test_the_gradient_of_the_loss_by_finite_differences(made):
    model, _, objective, _, collate, rolled = made
    batch = objective.collate(rolled, collate)
    batch['advantage'] = torch.linspace(-1, 1, len(rolled))      # none is zero
    p = next(p for n, p in model.named_parameters() if n.endswith('norm.weight') and 'language_model' in n)
    p.requires_grad_(True)
    g = torch.autograd.grad(objective.loss(model, batch)[0], p)[0]
    i, eps = g.abs().argmax(), 1e-2
    values = []
    with torch.no_grad():
        for d in (eps, -eps):
            p[i] += d
            values.append(objective.loss(model, batch)[0].item())
            p[i] -= d
    p.requires_grad_(False)
    assert abs((values[0] - values[1])/(2*eps) - g[i].item()) < .02*abs(g[i].item()) + 1e-3


# Own answers as samples

@pytest.mark.parametrize('ended, ids', [(True, [5, 6, 9, 2]), (False, [5, 6, 9])])
def test_what_was_said_is_scored_and_the_right_answer_is_not(ended, ids):
    prompt = dict(input_ids=[5, 6, 7, 2], labels=[-100, -100, 7, 2], image=3)
    s = said_sample(prompt, dict(ids=[9], ended=ended), 2, group=1)
    assert s == dict(input_ids=ids, labels=[-100, -100] + ids[2:], image=3, group=1)


def test_the_loss_sees_the_log_probabilities_that_were_drawn(made, world):
    model, processor, objective, samples, collate, rolled = made
    items = [world.train_items[s['item']] for s in samples[:3]]
    drawn = sample(model, processor, [[world.images/o['images'][0]] for o in items], [o['question'] for o in items],
                   4, max_new_tokens=8, logprobs=True, seed=5)
    with torch.no_grad(): logp = answer_logprobs(model, objective.collate(rolled, collate))
    assert torch.allclose(logp, torch.tensor([sum(d['logprobs']) for own in drawn for d in own]), atol=1e-3)


def test_groups_rewards_and_logs(made, world):
    model, processor, objective, samples, collate, rolled = made
    assert [s['group'] for s in rolled] == [0]*4 + [1]*4 + [2]*4
    rewards = np.array([s['reward'] for s in rolled]).reshape(3, 4)
    assert np.allclose(advantages(rewards).ravel(), [s['advantage'] for s in rolled])
    with torch.no_grad(): _, n, logs = objective.loss(model, objective.collate(rolled, collate))
    assert n == 12 and logs['reward'] == rewards.sum() and logs['entropy'] > 0
    assert logs['equal'] == 4*(np.ptp(rewards, axis=1) == 0).sum()
    assert rolled == objective.rollout(model, samples[:3], 5)
    other = objective.rollout(model, samples, 6)
    assert 0 < np.mean([s['reward'] for s in other]) < 1


def test_the_placebo_earns_as_much(made):
    model, _, objective, samples, *_ = made
    plain = objective.rollout(model, samples, 0)
    objective.permuted = True
    try: dealt = objective.rollout(model, samples, 0)
    finally: objective.permuted = False
    rewards = lambda made: [s['reward'] for s in made]
    assert [s['input_ids'] for s in plain] == [s['input_ids'] for s in dealt]
    assert sorted(rewards(plain)) == sorted(rewards(dealt)) and rewards(plain) != rewards(dealt)


def test_bad_input_is_refused(made, world):
    model, processor, objective, samples, collate, _ = made
    with pytest.raises(ValueError, match='with a processor and items'): as_objective('policy_gradient')
    with pytest.raises(ValueError, match='n is 1'): PolicyGradient(processor, world.train_items, world.images, n=1)
    with pytest.raises(UnknownName, match='no reward'): PolicyGradient(processor, world.train_items, world.images, 'exakt')
    with pytest.raises(ValueError, match="sampler 'rollout'"): objective.collate(samples[:2], collate)
    with pytest.raises(ValueError, match='leave `weights` out'): objective.rollout(model, [dict(samples[0], weights=[1.])], 0)
    with pytest.raises(ValueError, match="'strange' has no item"):
        objective.encode([dict(world.records[0], id='strange')], lambda records: ([{}], []))


def test_a_checkpoint_knows_the_reward(made, world):
    processor = made[1]
    settings = [PolicyGradient(processor, world.train_items, world.images, r).settings() for r in ('exact', 'yes_no', {'exact': 4, 'short': 1})]
    assert len({s['reward'] for s in settings}) == 3 and all(s['n'] == 4 for s in settings)


# Training

@pytest.mark.slow
def test_the_reward_rises(made, world):
    model, processor, objective, samples, collate, _ = made
    mean = lambda: np.mean([s['reward'] for s in objective.rollout(model, samples, 1)])
    before = mean()
    stage = Stage('pg', ('projector', 'language_model'), 1e-4, 10, 14, warmup=.3, sampler='rollout')
    rows = fit(model, samples, collate, stage, objective=objective)
    assert mean() > before + .1 and {'reward', 'equal', 'entropy'} <= set(rows[0])


@pytest.mark.slow
def test_an_arm_is_trained_and_asked(world):
    result = run_policy_gradient(dict(name='pg', objective='policy_gradient'), 0, dict(lr=1e-4, epochs=1, prompts=8, n=2), world)
    assert len(result.credits) == len(world.items) and result.steps == 2 and result.tokens


@pytest.mark.slow
def test_the_study_ends_with_a_table(tmp_path):
    env = {**os.environ, 'LLAVA_MED_OUTPUTS': str(tmp_path), 'LLAVA_MED_ROOT': str(REPO), 'PYTHONPATH': str(REPO), 'OMP_NUM_THREADS': '1'}
    words = [sys.executable, '-m', 'papermill', '-k', 'python3', REPO/'nbs/recipes/rl/policy_gradient_study.ipynb', tmp_path/'out.ipynb']
    done = subprocess.run(list(map(str, words)), cwd=REPO, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with open(tmp_path/'scratch/policy_gradient_smoke/study.csv', newline='') as f: rows = list(csv.DictReader(f))
    assert tuple(rows[0]) == STUDY_COLUMNS
    assert [r['verdict'] for r in rows if r['row'] == 'policy_gradient-cross_entropy'] != ['']
