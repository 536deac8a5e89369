"Studies: what a file may say, that finished trainings are kept, and what verdicts rest on."
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import llava_med
from llava_med.recipes.study import (NOT_SHOWN, NOT_TESTABLE, SHOWN, STUDY_COLUMNS, Arm, ArmResult,
    StudyError, new_recipe, read_arms, read_study, read_study_file, run_study,
    seed_paired_difference, study_figure, study_rows, study_table, study_verdicts, verdict_of, write_study)

REPO = Path(__file__).resolve().parents[1]
FILE = '''
name: toy
question: Does it help?
margin: 0.02
metric: strict
seeds: [0, 1, 2]
arms:
  base: {role: base, gain: 0.0}
  idea: {role: idea, gain: 0.3}
  placebo: {role: placebo, gain: 0.0}
  oracle: {role: positive_control, gain: 0.35}
sizes:
  full: {n: 200}
  smoke: {n: 20, seeds: [0]}
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path/'toy_study.yaml'
    path.write_text(FILE)
    return path


def train(arm, seed, sizes):
    rng = np.random.default_rng([seed, len(arm['name'])])
    n = sizes['n']
    return ArmResult(rng.random(n) < .5 + arm['gain'], range(n), 5, 100, .5, 7)


# The file

def test_a_size_may_name_its_own_seeds(file):
    full, smoke = read_study_file(file), read_study_file(file, 'smoke', say=str)
    assert (full.seeds, full.sizes) == ([0, 1, 2], {'n': 200})
    assert (smoke.seeds, smoke.sizes, smoke.size) == ([0], {'n': 20}, 'smoke')


@pytest.mark.parametrize('old, new, says', [
    ('role: idea', 'role: ideas', "arm 'idea' has the role 'ideas'; known: idea, base, core"),
    ('role: base', 'role: core', 'one base and at least one idea'),
    ('role: placebo', 'role: base', 'one base and at least one idea'),
    ('role: idea', 'role: core', 'one base and at least one idea'),
    ('margin: 0.02', 'margin: two', "margin is 'two'"),
    ('margin: 0.02', 'margin: 2', 'margin is 2'),
    ('[0, 1, 2]', '3', 'seeds is 3'),
    ('[0, 1, 2]', '[]', 'seeds is []'),
    ('[0, 1, 2]', '[0, 0]', 'seeds is [0, 0]'),
    ('metric:', 'metrik:', "no key 'metrik'. Did you mean metric?"),
    ('question: Does it help?', '', 'the study lacks question'),
    ('full:', 'large:', "there is no size 'full'; known: large, smoke"),
    ('{role: idea, gain: 0.3}', '{gain: 0.3}', "arm 'idea' has no role"),
    ('{role: idea, gain: 0.3}', 'idea', "arm 'idea' has no role"),
    ('name: toy', 'name: [', 'not valid YAML')])
def test_a_wrong_file_is_refused_in_one_sentence(file, old, new, says):
    file.write_text(FILE.replace(old, new, 1))
    with pytest.raises(StudyError) as e: read_study_file(file)
    assert says in str(e.value) and file.name in str(e.value) and '\n' not in str(e.value)


def test_files_that_are_no_study(tmp_path, file):
    with pytest.raises(StudyError, match='no such file'): read_study_file(tmp_path/'none.yaml')
    file.write_text('- a\n')
    with pytest.raises(StudyError, match='this is no study'): read_study_file(file)
    file.write_text(FILE.split('arms:')[0] + 'arms: [a]\nsizes: {full: {}}\n')
    with pytest.raises(StudyError, match='arms is'): read_study_file(file)


@pytest.mark.parametrize('line, says', [('  placebo: {role: placebo, gain: 0.0}\n', 'no placebo'),
                                        ('  oracle: {role: positive_control, gain: 0.35}\n', 'no positive control')])
def test_what_weakens_a_study_is_said(file, line, says):
    file.write_text(FILE.replace(line, ''))
    said = []
    read_study_file(file, say=said.append)
    assert len(said) == 1 and says in said[0]


# Running

def test_a_study_is_run_once(file, tmp_path):
    study, calls = read_study_file(file), []
    def run(arm, seed, sizes): calls.append((arm['name'], seed)); return train(arm, seed, sizes)
    rows = run_study(study, run, tmp_path/'out', say=str)
    assert len(calls) == 12
    by = {r['row']: r for r in rows}
    assert by['idea-base']['verdict'] == SHOWN and by['idea']['steps'] == 5 and by['idea']['params'] == 7
    assert [r['row'] for r in read_study(tmp_path/'out/study.csv')] == list(by) and list(rows[0]) == list(STUDY_COLUMNS)
    again = run_study(study, run, tmp_path/'out', say=str)
    assert len(calls) == 12 and [r['value'] for r in again] == [r['value'] for r in rows]
    study.arms['idea']['gain'] = .2                     # one arm changes, another is new
    study.arms['other'] = dict(role='idea', gain=.1)
    run_study(study, run, tmp_path/'out', say=str)
    assert calls[12:] == [(n, s) for n in ('idea', 'other') for s in (0, 1, 2)]
    study.arms['other']['role'] = 'core'                # a role changes no training
    study.margin = .5
    assert {r['row']: r for r in run_study(study, run, tmp_path/'out', say=str)}['idea-base']['verdict'].startswith(NOT_SHOWN)
    assert len(calls) == 18
    study.sizes = dict(n=30)
    run_study(study, run, tmp_path/'out', say=str)
    assert len(calls) == 18 + 15


def test_a_changed_function_trains_again(file, tmp_path):
    study, calls = read_study_file(file, 'smoke', say=str), []
    def first(arm, seed, sizes): calls.append(1); return train(arm, seed, sizes)
    def second(arm, seed, sizes): calls.append(2); return train(arm, seed, sizes)
    for f in (first, second, second): run_study(study, f, tmp_path/'out', say=str)
    assert calls == [1]*4 + [2]*4


def test_a_changed_recipe_trains_again_and_a_changed_library_is_said(file, tmp_path, monkeypatch):
    shutil.copytree(REPO/'llava_med', tmp_path/'llava_med')
    monkeypatch.setattr(llava_med, '__file__', str(tmp_path/'llava_med/__init__.py'))
    study, calls, said = read_study_file(file, 'smoke', say=str), [], []
    study.recipes = ['llava_med.recipes.rewards']
    def run(arm, seed, sizes): calls.append(seed); return train(arm, seed, sizes)
    def change(name):
        path = tmp_path/'llava_med'/name
        path.write_text(path.read_text() + '\n# changed\n')
    run_study(study, run, tmp_path/'out', say=str)
    change('core/vocabulary.py')                        # which rewards need by way of data.claims
    run_study(study, run, tmp_path/'out', say=said.append)
    assert len(calls) == 4 and '4 of them were made with another version of the library' in ' '.join(said)
    change('recipes/study.py')
    run_study(study, run, tmp_path/'out', say=str)
    assert len(calls) == 4
    change('recipes/rewards.py')
    run_study(study, run, tmp_path/'out', say=str)
    assert len(calls) == 8


def test_an_unknown_recipe_is_named(file, tmp_path):
    study = read_study_file(file)
    study.recipes = ['llava_med.recipes.none']
    with pytest.raises(ValueError, match="no recipe module 'llava_med.recipes.none'"): run_study(study, train, tmp_path/'out')


@pytest.mark.parametrize('result, says', [
    (ArmResult([.5, 2.], 'ab'), 'no fraction'), (ArmResult([.5, np.nan], 'ab'), 'no fraction'), (ArmResult([.5], 'ab'), '1 credits for 2 clusters'),
    (ArmResult([], ''), '0 credits'), ([.5], 'return an ArmResult')])
def test_credits_that_cannot_be_compared_are_refused(file, tmp_path, result, says):
    with pytest.raises(StudyError, match='arm base, seed 0') as e: run_study(read_study_file(file), lambda *a: result, tmp_path/'out', say=str)
    assert says in str(e.value) and not read_arms(tmp_path/'out/arms.jsonl')


def test_arms_that_were_asked_other_items_are_refused(file, tmp_path):
    def run(arm, seed, sizes): return ArmResult([1., 0.], ['a', f'b{seed}'])
    with pytest.raises(StudyError, match='arm base, seed 1 was asked other items'): run_study(read_study_file(file), run, tmp_path/'out', say=str)


def test_a_failed_arm_is_named_and_the_others_are_kept(file, tmp_path):
    study = read_study_file(file)
    def run(arm, seed, sizes):
        if arm['name'] == 'placebo' and seed: raise MemoryError('too large')
        return train(arm, seed, sizes)
    with pytest.raises(StudyError, match='arm placebo, seed 1: MemoryError: too large'): run_study(study, run, tmp_path/'out', say=str)
    assert len(read_arms(tmp_path/'out/arms.jsonl')) == 7


SLOW = '''
import sys, time
from pathlib import Path
from llava_med.recipes.study import ArmResult, read_study_file, run_study
def run(arm, seed, sizes):
    with open(sys.argv[3], 'a') as f: f.write(f"{arm['name']} {seed}\\n")
    time.sleep(float(sys.argv[4]))
    return ArmResult([(i*7 + seed) % 3 == 0 for i in range(30)], range(30))
def main(): run_study(read_study_file(sys.argv[1]), run, sys.argv[2])
if __name__ == '__main__': main()
'''


def lines(path): return path.read_text().splitlines() if path.exists() else []


def test_a_killed_study_goes_on(file, tmp_path):
    script, calls, log = tmp_path/'slow.py', tmp_path/'calls', tmp_path/'out/arms.jsonl'
    script.write_text(SLOW)
    start = lambda s: subprocess.Popen([sys.executable, str(script), str(file), str(tmp_path/'out'), str(calls), str(s)],
                                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    p, until = start(.4), time.time() + 60
    while len(lines(log)) < 4 and time.time() < until: time.sleep(.05)
    with pytest.raises(StudyError, match='another process runs this study'): run_study(read_study_file(file), train, tmp_path/'out')
    p.send_signal(signal.SIGKILL); p.wait()
    kept = [json.loads(x) for x in lines(log)]
    assert 4 <= len(kept) < 12
    with open(log, 'a') as f: f.write('{"key": "half a li')   # what a kill within a write leaves
    before = len(lines(calls))
    p = start(0)
    said = p.communicate()[0]
    assert p.returncode == 0, said
    assert f'{len(kept)} finished trainings are kept' in said
    assert lines(calls)[before:] == [f'{a} {s}' for a in ('base', 'idea', 'placebo', 'oracle') for s in range(3)][len(kept):]
    assert [json.loads(x) for x in lines(log)][:len(kept)] == kept and len(lines(log)) == 12
    assert read_study(tmp_path/'out/study.csv')


# What a verdict rests on

def test_every_placebo_is_to_be_beaten_and_every_control_to_be_found():
    rng = np.random.default_rng(0)
    arm = lambda name, role, gain: Arm(name, role, rng.random((3, 400)) < .4 + gain)
    base, idea, oracle = arm('base', 'base', 0), arm('idea', 'idea', .2), arm('oracle', 'positive_control', .3)
    weak, strong = arm('weak', 'placebo', 0), arm('strong', 'placebo', .2)
    deaf = arm('deaf', 'positive_control', 0)
    say = lambda *arms: next(r['verdict'] for r in study_rows('toy', arms, np.arange(400)) if r['verdict'])
    assert say(base, idea, weak, oracle) == SHOWN
    assert say(base, idea, weak, strong, oracle).startswith(NOT_SHOWN)
    assert say(base, idea, weak, oracle, deaf) == NOT_TESTABLE


def test_no_spread_is_no_certainty():
    one, images = np.ones((3, 50)), np.arange(50)
    same, all_differ = seed_paired_difference(one, one, images), seed_paired_difference(one, one*0, images)
    assert same['p'] == 1 and same['mde'] == pytest.approx(1 - .05**(1/50)) and same['low'] < 0 < same['high']
    assert all_differ['p'] < 1e-6 and all_differ['value'] == 1   # an oracle that is always right is found
    assert seed_paired_difference(one[:, :1], one[:, :1]*0, images[:1])['p'] == 1
    assert '≥ 0.0' not in verdict_of(same | dict(p_corrected=1.))


@pytest.mark.parametrize('n,value', [(2, 1), (3, 1), (6, 1), (30, 1), (3, 0), (30, .2)])
def test_arms_that_differ_alike_have_a_width_and_a_p_that_agrees(n, value):
    r = seed_paired_difference(np.full((3, n), value), np.zeros((3, n)), np.arange(n))
    assert -1 <= r['low'] < r['high'] <= 1 and (r['p'] < .05) == (r['low'] > 0)
    arms = [Arm(k, role, np.full((3, n), float(v))) for k, role, v in (('base', 'base', 0), ('idea', 'idea', value))]
    row = study_rows('toy', arms, np.arange(n))[1]
    if value == 1: assert (row['low'], row['high']) == (pytest.approx(.05**(1/n)), 1)


def test_a_study_of_one_image_shows_nothing_and_says_so(tmp_path):
    arms = [Arm('base', 'base', np.zeros((2, 3))), Arm('idea', 'idea', np.ones((2, 3)))]
    rows = study_rows('toy', arms, np.array(['a']*3))
    assert rows[2]['p'] == 1 and not np.isfinite(rows[2]['low']) and 'nothing could have been seen' in rows[2]['verdict']
    assert 'no interval' in study_verdicts(rows) and len(study_figure(rows).axes) == 1
    write_study(tmp_path/'study.csv', rows)
    assert 'no interval' in study_verdicts(read_study(tmp_path/'study.csv'))


def test_table_figure_and_words_say_the_same(file, tmp_path):
    rows = run_study(read_study_file(file), train, tmp_path/'out', say=str)
    table, words = study_table(rows), study_verdicts(rows)
    value = next(r['value'] for r in rows if r['row'] == 'idea-base')
    assert table.loc['idea-base', 'value'] == round(100*value, 1) and f'{100*value:+.1f} points' in words and SHOWN in words
    fig = study_figure(rows)
    assert len(fig.axes[0].get_yticklabels()) == sum(bool(r['control']) for r in rows) and SHOWN in fig.axes[0].get_title('left')
    assert study_table(read_study(tmp_path/'out/study.csv')).loc['idea-base', 'value'] == round(100*value, 1)


def test_a_new_recipe_never_overwrites(tmp_path):
    shutil.copytree(REPO/'nbs/recipes/_template', tmp_path/'_template')
    made = new_recipe('losses', 'rare_answers', tmp_path)
    assert [p.name for p in made] == ['rare_answers.ipynb', 'rare_answers_study.ipynb', 'rare_answers_study.yaml']
    assert (tmp_path/'losses/.notest').exists()     # nbdev_test looks into the folder of a notebook only
    texts = ' '.join(p.read_text() for p in made)
    assert not [w for w in ('my_idea', 'MyIdea', 'My idea', 'my_family') if w in texts]
    with pytest.raises(StudyError, match='is there already'): new_recipe('other', 'rare_answers', tmp_path)
    for bad in ('Rare', 'rare answers', '_rare', '../x', '7b'):
        with pytest.raises(StudyError, match='cannot be the name'): new_recipe('losses', bad, tmp_path)
