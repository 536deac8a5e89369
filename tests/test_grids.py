"Grids of runs on a toy pipeline: what is refused, what is shared, what fails, what goes on, here and on a cluster."
import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from conftest import PARAMETERS, Toy, dask_processes, wait_for
from llava_med.lab.runner import library_fingerprint
from llava_med.lab.commands import main
from llava_med.lab.tasks import Guard, lay_out
from llava_med.lab.tables import batch_rows, over_seeds
from llava_med.lab.grids import grids, plan_grid, read_grid
from llava_med.core.runs import read_json, read_run
from llava_med.lab.tasks import gpus_here
from llava_med.lab.sweeps import run_batch

REPO = Path(__file__).resolve().parents[1]
ENV = {**os.environ, 'PYTHONPATH': str(REPO), 'OMP_NUM_THREADS': '1'}
COMMAND = [sys.executable, '-c', 'import sys; from llava_med.lab.commands import main; sys.exit(main())', 'batch']
SCORES = ("from llava_med.core.runs import write_csv\nvalue = round(1/(n + 1), 6)\n"
          "row = dict(model='stage2', dataset='toy', split='test', condition='image', slice='all', metric='strict', value=value, low=value - .1, high=value + .1, n_items=9, n_images=3)\n"
          "write_csv(run_dir(run)/'2_two'/'scores.csv', [row, row | {'slice': 'a=b'}])\n")
WORST = '''# what can go wrong, while the file `bad` is there
bad = os.path.exists(os.environ['LLAVA_MED_ROOT'] + '/bad')
if bad and n == 2:
    raise ValueError('the numbers do not fit')
if bad and n == 5: os.kill(os.getpid(), 9)
if bad and n == 7: rows = [bytearray(40_000_000) for i in range(30) if not time.sleep(.1)]; time.sleep(60)
if bad and n == 11: time.sleep(300)
'''


class Lab(Toy):
    "A toy repository of two steps and grids for it."
    steps = ('1_one', '2_two')

    def __init__(self, folder, monkeypatch, work=SCORES):
        super().__init__(folder, monkeypatch)
        self.mark(monkeypatch)
        self.step('2_two', work)

    def mark(self, monkeypatch): monkeypatch.setattr('llava_med.lab.runner.library_fingerprint', library_fingerprint)   # as workers compute it

    def grid(self, text, name='g'):
        (self.root/f'{name}.yaml').write_text(text)
        return str(self.root/f'{name}.yaml')

    def batch(self, text, name='g', **how):
        "What a grid gives, and the lines that it said."
        said = []
        return run_batch(self.grid(text, name), say=said.append, **how), said

    def table(self, name='g'):
        with open(self.outputs/name/'table.csv', newline='') as f: return list(csv.DictReader(f))


@pytest.fixture
def lab(tmp_path, monkeypatch): return Lab(tmp_path, monkeypatch)


def alive(p): return p.is_running() and p.status() != 'zombie'


# What is refused before anything runs

@pytest.mark.parametrize('text, says', [
    ('preset: toy\ngrid: {2_two.nn: [1]}', 'Did you mean n? Known: seed, lr, n, tag, files'),
    ('preset: toy\ngrid: {2_tow.n: [1]}', 'Known: 1_one, 2_two'),
    ('preset: toy\ngrid: {2_two.n: []}', '2_two.n: the list is empty'),
    ('preset: toy\ngrid: {2_two.n: 3}', 'write a list'),
    ('preset: toy\ngrid: {2_two.n: [a]}', 'must be of type int'),
    ('preset: toy\ngrid: {2_two.n: [1, 1]}', 'the value 1 stands twice'),
    ('preset: toy\ngrid: {2_two.n: [1], 2_two.n: [2]}', 'stands twice'),
    ('preset: toy\ngrid: {2_two.n: [1], 2.n: [2]}', '2_two.n stands twice'),
    ('preset: toy\ngrid: {2_two.lr: {from: 1e-4, n: 3}}', 'the range has no end (`to`)'),
    ('preset: toy\ngrid: {2_two.lr: {from: 1e-4, to: 1e-3}}', 'either `step` or `n`'),
    ('preset: toy\ngrid: {2_two.lr: {from: 1e-4, to: 1e-3, m: 3}}', 'Known: from, to, step, n, log'),
    ('preset: toy\ngrid: {2_two.lr: {from: 0, to: 1, n: 3, log: true}}', 'above 0'),
    ('preset: toy\ngrid: {2_two.n: {from: 1, to: 9, step: -1}}', 'never lead'),
    ('preset: toy\ngrid: {2_two.n: {from: 1, to: 2, n: 5}}', 'stands twice'),
    ('preset: toy\ngrid: {2_two.seed: [1, 2]}', 'seeds belong under'),
    ('preset: toy\ngrid: {n: [1, 2]}', 'STEP.NAME'),
    ('preset: toy\nonly: [1]\ngrid: {2_two.n: [1, 2]}', 'not among the steps'),
    ('preset: toys', 'Did you mean toy? Known: toy'),
    ('grid: {2_two.n: [1]}', 'names no preset'),
    ('preset: toy\ngird: {}', 'Did you mean grid?'),
    ('preset: toy\nseeds: []', 'not empty'),
    ('preset: toy\nseeds: [0, 0]', 'a seed stands twice'),
    ('preset: toy\nseeds: [a]', "'a' is no whole number"),
    ('preset: toy\ncases: [{name: a}, {name: a}]', "two cases are named 'a'"),
    ('preset: toy\ncases: [{parameters: {}}]', 'a case is named'),
    ('preset: toy\ncases: []', 'not empty'),
    ('preset: toy\ncases: [{name: a, only: [7]}]', 'Known: 1_one, 2_two'),
    ('preset: toy\ncases: [{name: A}, {name: a}]', "two runs would be named"),
    ('preset: toy\nretries: -1', 'retries is -1'),
    ('preset: toy\nmemory_gb: much', "memory_gb is 'much'"),
    ('preset: toy\nname: ../x', 'cannot name a batch'),
    ('preset: toy\ngpus: 99', 'asks for 99 GPU'),
    ('- a', 'must hold'), ('preset: {', 'not valid YAML'),
    ('preset: toy\nname:', "'None' cannot name a batch"), ('preset: toy\nname: yes', 'is read as bool: put it between quotes'),
    ('preset: toy\nname: 1e-5', 'put it between quotes'), ('preset: toy\nname: ' + 'a'*240, 'at most 100 letters'),
    ('preset: toy\ncases: [{name: }]', "a case is named 'None'"), ('preset: toy\ncases: [{name: a, preset: }]', 'the case a names no preset'),
    ('preset: toy\ndescription: [1]', 'the description must be a text'), ('preset: toy\nname: 2020-13-45', 'not valid YAML: a value cannot be read'),
    ('preset: toy\nretries: ' + '9'*5000, 'not valid YAML: a value cannot be read'),
    ('preset: toy\nmemory_gb: .nan', 'memory_gb is nan, and must be a number from 0'), ('preset: toy\ntimeout_min: .inf', 'timeout_min is inf'),
    ('preset: toy\nmemory_gb: 1' + '0'*400, 'memory_gb is 1000'), ('preset: toy\nretries: 1000000', 'a whole number from 0 to 100'),
    ('preset: toy\nseeds: [99999999999999999999]', 'no whole number from 0 to 4294967295'),
    ('preset: toy\nseeds: {from: 0, to: 2, step: 0.5}', 'must be whole numbers'), ('preset: toy\nseeds: [' + ','.join(map(str, range(2001))) + ']', '2001 runs are too many'),
    ('preset: toy\nseed_steps: 0', 'seed_steps must be a list'), ('preset: toy\nonly: false', 'only must be a list'),
    ('preset: toy\nsizes: 0', 'sizes must hold lines'), ('preset: toy\ngrid: 0', 'grid must hold lines'),
    ('preset: toy\nparameters: {2_two.seed: 3}', '2_two.seed: seeds belong under'), ('preset: toy\nparameters: {all.seed: 3}', 'seeds belong under'),
    ('preset: toy\nonly: [1]\nparameters: {2_two.n: 5}', '2_two.n has a value, but no run has that step'),
    ('preset: toy\ncases: [{name: a}, {name: b, only: [1], parameters: {2_two.n: 5}}]', 'has a value in the case b, but 2_two is not among'),
    ('preset: toy\nparameters: {2_two.n: 5, 2_two: {n: 6}}', '2_two.n stands twice'), ('preset: toy\nparameters: {2_two.n: 5, 2.n: 6}', '2_two.n stands twice'),
    ('preset: toy\ngrid: {2_two.n: [1]}\ncases: [{name: a, parameters: {2_two.n: 5}}]', 'has one value under `parameters` and varies'),
    ('preset: toy\nparameters: {2_two.files: [2020-01-01]}', '2020-01-01 is a date: put it between quotes'),
    ('preset: toy\nparameters: {2_two.lr: .nan}', 'nan is no number'), ('preset: toy\nparameters: {2_two.tag: 5}', 'Put it between quotes'),
    ("preset: toy\nparameters: {2_two.lr: '1e-5'}", 'Write the number without quotes'),
    ("preset: toy\nparameters: {2_two.tag: '{run}/9_none/x'}", "'9_none' is none of the steps"),
    ("preset: toy\nparameters: {1_one.tag: '{run}/2_two/x'}", 'which is a later step: name one that comes before'), ('preset: toy\nparameters: {2_two.run: x}', 'the name of the grid'),
    ('preset: toy\ngrid: {2_two.n: {from: 1, to: 2, step: 0.5}}', 'must be whole numbers'), ('preset: toy\ngrid: {2_two.n: {from: 1, to: 1000000000, step: 1}}', 'more than 1000 values'),
    ('preset: toy\ngrid: {2_two.lr: {from: 0, to: 1e308, step: 1e-308}}', 'parts of a range are numbers'),
    ('preset: toy\ngrid: {2_two.n: {from: 1, to: 1' + '0'*400 + ', n: 3}}', 'parts of a range are numbers'),
    ("preset: toy\ngrid: {2_two.lr: {from: 1, to: 3, n: 2, log: 'no'}}", '`log` is true or false'),
    ('preset: toy\ngrid: {1_one.n: {from: 1, to: 1000, step: 1}, 2_two.n: {from: 1, to: 1000, step: 1}}', '1000000 runs are too many'),
])
def test_a_wrong_grid_runs_nothing(lab, capsys, text, says):
    assert main(['batch', lab.grid(text)]) == 2
    err = capsys.readouterr().err
    assert says in err and len(err.strip().splitlines()) == 1 and 'g.yaml' in err
    assert not lab.outputs.exists()


def test_a_grid_that_is_not_there(lab, capsys):
    assert main(['batch', 'none']) == 2 and main(['batch', 'none.yaml']) == 2
    assert 'There is no grid' in (err := capsys.readouterr().err) and 'does not exist' in err
    assert main(['batch', lab.grid('preset: toy'), '--workers', '0']) == 2
    capsys.readouterr()
    (lab.root/'g.txt').write_text('preset: toy')
    for words, says in (([str(lab.root)], 'is a folder'), ([str(lab.root/'g.txt')], 'must end in .yaml'), (['x'*5000 + '.yaml'], 'does not exist'), ([''], 'no grid'),
                        (['g', '--scheduler', ''], 'cannot be empty'), (['g', '--preset', ''], 'cannot be empty'),
                        ([lab.grid('preset: toy\ncases: [{preset: toy}]', 'own'), '--preset', 'other'], 'names a preset of its own'), ([lab.grid('preset: toy\ncases: 5'), '--preset', 'other'], 'no preset named')):
        assert main(['batch', *words]) == 2
        err = capsys.readouterr().err
        assert says in err and len(err.strip().splitlines()) == 1, err


def test_what_a_preset_needs_is_asked_for_before_anything_runs(lab, capsys):
    lab.preset('toy', "needs: {data/large: llava-med get large}\nparameters: {2_two: {tag: data/large/model}}\n")
    assert main(['batch', lab.grid('preset: toy')]) == 2
    assert 'g.yaml needs data/large, which is not there: `llava-med get large`' in capsys.readouterr().err and not lab.outputs.exists()
    assert main(['batch', lab.grid('preset: toy'), '--plan']) == 0
    assert 'data/large is needed and not there' in capsys.readouterr().out
    assert main(['batch', lab.grid('preset: toy\nonly: [1]'), '--plan']) == 0
    assert 'data/large' not in capsys.readouterr().out


def test_a_text_may_be_longer_than_a_path(lab):
    runs, _ = lay_out(read_grid(lab.grid(f"preset: toy\nparameters: {{2_two.tag: '{'x'*600}', 1_one.tag: '~5 mm'}}")))
    assert runs[0].plan['2_two']['tag'] == 'x'*600


def test_damaged_files_of_a_batch_are_named(lab, capsys):
    "What a disk or a hand has broken is named with its remedy, and what only informs is passed over."
    text = 'preset: toy\ngrid: {2_two.n: [1, 2]}'
    lab.batch(text)
    for broken in ('{}', '[]', '{"steps": {"1_one": 3}, "hashes": {}}', '{"steps"'):
        (lab.outputs/'g/n2-s0/run.json').write_text(broken)
        assert main(['batch', lab.grid(text)]) == 1
        assert 'n2-s0/run.json is damaged: delete' in capsys.readouterr().err
        assert main(['batch', lab.grid('preset: toy', 'other'), '--plan']) == 0, 'another batch does not mind'
    shutil.rmtree(lab.outputs/'g/n2-s0')
    (lab.outputs/'g/plan.json').write_text('[]')
    capsys.readouterr()
    assert main(['batch', lab.grid(text)]) == 2 and 'plan.json is damaged' in capsys.readouterr().err
    (lab.outputs/'g/plan.json').unlink()
    for name in ('progress.json', 'table.csv', 'costs.csv', 'n1-s0/1_one/ledger.json'): (lab.outputs/'g'/name).write_text('{"')
    got, _ = lab.batch(text)
    assert len(got['done']) == 2 and got['ran'] <= 3 and len(lab.table()) == 2
    (lab.outputs/'file').write_text('')
    assert main(['batch', lab.grid('preset: toy\nname: file', 'file')]) == 2 and 'is a file' in capsys.readouterr().err


def test_a_scheduler_that_is_not_there(lab, capsys, monkeypatch):
    from llava_med.lab import sweeps
    executor = sweeps.executor_for
    monkeypatch.setattr(sweeps, 'executor_for', lambda *a: executor(*a, wait=2))
    assert main(['batch', lab.grid('preset: toy'), '--scheduler', 'tcp://127.0.0.1:9']) == 1
    assert 'No scheduler answers at tcp://127.0.0.1:9' in capsys.readouterr().err
    assert not lab.outputs.exists()


def test_two_batches_in_one_folder(lab, capsys):
    lab.step('2_two', "time.sleep(60)")
    p = subprocess.Popen([*COMMAND, lab.grid('preset: toy\nname: same')], env={**ENV, **lab_env(lab)}, stdout=subprocess.DEVNULL)
    try:
        wait_for((lab.outputs/'same/progress.json').exists, 90)
        assert main(['batch', lab.grid('preset: toy\nname: same')]) == 1
        assert f"The batch 'same' is in use by process {p.pid}" in capsys.readouterr().err
        assert main(['batch', lab.grid('preset: toy\nname: same', 'other')]) == 2
        assert 'was made by the grid g.yaml, not by the grid other.yaml' in capsys.readouterr().err
    finally: p.kill(); p.wait()
    (lab.outputs/'lone').mkdir()
    (lab.outputs/'lone/run.json').write_text('{}')
    assert main(['batch', lab.grid('preset: toy\nname: lone', 'lone')]) == 2
    assert 'is the folder of a run' in capsys.readouterr().err


def lab_env(lab): return {'LLAVA_MED_ROOT': str(lab.root), 'LLAVA_MED_OUTPUTS': str(lab.outputs)}


# The plan

def test_values_arrive_and_later_levels_win(lab):
    lab.preset('toy', 'parameters: {2_two: {lr: 5e-1, tag: preset}, all: {n: 3}}\n')
    text = ('preset: toy\nseeds: {from: 3, to: 5, step: 2}\nseed_steps: [2]\nparameters: {2_two.tag: all, 1.files: [x]}\n'
            'grid: {2.lr: {from: 1e-4, to: 1e-2, n: 3, log: true}}\ncases: [{name: a}, {name: b, parameters: {2_two: {tag: b}}, grid: {all.n: [1, 2]}}]')
    runs = {r.name: r for r in plan_grid(read_grid(lab.grid(text)))}
    assert len(runs) == 2*(3 + 6) and 'b-lr0.001-n2-s5' in runs
    b, a = runs['b-lr0.001-n2-s5'].plan, runs['a-lr0.01-s3'].plan
    assert (b['1_one']['n'], b['2_two']['n'], b['2_two']['tag'], b['2_two']['lr'], b['2_two']['seed'], b['1_one']['seed']) == (2, 2, 'b', 1e-3, 5, 0)
    assert (a['1_one']['n'], a['2_two']['tag'], a['2_two']['lr'], a['1_one']['files'], a['2_two']['run']) == (3, 'all', 1e-2, ['x'], 'g/a-lr0.01-s3')


def test_planned_keys_are_those_of_the_runner(lab):
    from llava_med.lab.runner import step_inputs, step_key
    got, _ = lab.batch('preset: toy\ngrid: {1_one.n: [1, 2]}')
    runs, tasks = lay_out(read_grid(lab.grid('preset: toy\ngrid: {1_one.n: [1, 2]}')))
    assert got['failures'] == [] and got['ran'] == 4 and all(u.done for u in tasks.values())
    for r in runs:
        record = read_run(f'g/{r.name}')
        assert {s: p['key'] for s, p in record['steps'].items()} == r.keys
        assert all(step_key(step_inputs(s, r.plan[s], record)) == k for s, k in r.keys.items())


def test_a_value_can_name_an_earlier_step_of_its_own_run(lab):
    text = "preset: toy\nparameters: {2_two.tag: '{run}/1_one'}\ngrid: {1_one.n: [1, 2]}"
    got, _ = lab.batch(text)
    assert got['failures'] == [] and lab.out('2_two', 'g/n2-s0')['tag'] == str(lab.outputs/'g/n2-s0/1_one')
    assert lab.batch(text)[0]['ran'] == 0
    assert read_run('g/n1-s0')['steps']['2_two']['inputs']['parameters']['tag'] == '{run}/1_one'


def test_the_plan_is_shown_and_nothing_runs(lab, capsys):
    text = 'preset: toy\ngrid: {2_two.n: [1, 2, 3]}\nmemory_gb: 3\ntimeout_min: 10'
    assert main(['batch', lab.grid(text), '--plan']) == 0
    out = capsys.readouterr().out
    assert '6 steps: 4 to run, 2 shared' in out and '1_one (as n1-s0)' in out and 'no earlier run tells' in out and '3 GB' in out
    assert not lab.outputs.exists()
    lab.batch('preset: toy', 'first')
    assert main(['batch', lab.grid(text), '--plan']) == 0
    assert re.search(r'This takes about \d+ s', capsys.readouterr().out)


def test_a_grid_runs_with_another_preset(lab, capsys):
    "Sizes and limits are those of the file's own preset; {base} is the model of the one that is given."
    lab.preset('big', 'description: another\nhardware: {gpus: 0}\nparameters: {1_one: {n: 50}}\n')
    text = 'preset: toy\nsizes: {1_one.n: 3}\ntimeout_min: 9\ncases: [{name: a}]'
    assert main(['batch', lab.grid(text), '--preset', 'big', '--plan']) == 0
    out = capsys.readouterr().out
    assert out.startswith('g-big: 1 runs') and 'Limits' not in out
    assert [plan_grid(read_grid(lab.grid(text), p))[0].plan['1_one']['n'] for p in ('', 'big')] == [3, 50]
    assert main(['batch', lab.grid("preset: toy\nparameters: {2_two.tag: '{base}'}"), '--plan']) == 2
    assert 'no step of it names a base_model' in capsys.readouterr().err


@pytest.mark.parametrize('preset', ['tiny', 'llava_med_v15'])
def test_the_ablations_start_from_the_base_of_the_preset(preset):
    runs = {r.name: r.plan for r in plan_grid(read_grid('paper_ablations', preset))}
    base = runs['both-s0']['2_stage1_alignment']['base_model']
    assert runs['no_stage1-s0']['3_stage2_tuning']['start_from'] == runs['vqa_base-epochs3-s1']['3b_vqa_tuning']['start_from'] == base


def test_committed_grids_can_be_planned(monkeypatch):
    "Every grid of the repository names parameters that exist and shares steps; those whose rows do not outlive the batch stay within two hours."
    from llava_med.lab.tasks import total_time
    for name in grids():
        grid = read_grid(name)
        runs, tasks = lay_out(grid)
        assert len(tasks) < sum(len(r.plan) for r in runs)
        assert len({r.seed for r in runs}) >= 3 or name.endswith('_screen')
        if grid['finished']: continue
        assert all(u.estimate for u in tasks.values() if not u.step.startswith('0'))
        assert total_time(tasks, 2) < 7200, name


def test_a_batch_shows_that_it_lives_while_it_is_busy(lab):
    "Its pulse goes on beside the loop, which may share large folders for minutes; `stop` is the last word."
    from llava_med.lab.sweeps import Batch
    grid = read_grid(lab.grid('preset: toy'))
    batch = Batch(grid, *lay_out(grid), executor=None)
    batch.folder.mkdir(parents=True)
    pulse = batch.folder/'.alive'
    batch.beat(.02)
    wait_for(pulse.exists, 20)
    first = pulse.read_text()
    wait_for(lambda: pulse.read_text() not in ('', first), 20)
    batch.pulse('stop')
    time.sleep(.2)
    assert pulse.read_text() == 'stop'


# Twelve runs, four of which go wrong in four ways

BIG = ('name: {}\npreset: toy\ngrid: {{2_two.n: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]}}\nretries: {}\nmemory_gb: 0.7\ntimeout_min: 1.5\n')


@pytest.mark.slow
def test_four_of_twelve_fail_and_only_they_run_again(tmp_path, monkeypatch):
    lab = Lab(tmp_path, monkeypatch, WORST + SCORES)
    (lab.root/'bad').write_text('')
    got, said = lab.batch(BIG.format('big', 1), workers=2)
    fine = ['n1', 'n3', 'n4', 'n6', 'n8', 'n9', 'n10', 'n12']
    assert got['done'] == [f'{n}-s0' for n in fine] and got['ran'] == 13, '\n'.join(said)
    why = {f['run']: (f['cell'], f['error']) for f in got['failures']}
    assert sorted(why) == ['n11-s0', 'n2-s0', 'n5-s0', 'n7-s0']
    assert why['n2-s0'] == ("cell 3, `raise ValueError('the numbers do not fit')`", 'ValueError: the numbers do not fit')
    assert 'signal 9 (SIGKILL)' in why['n5-s0'][1] and 'over the limit of 0.7 GB (memory_gb)' in why['n7-s0'][1]
    assert 'limit of 1.5 min (timeout_min)' in why['n11-s0'][1] and all(c.startswith('cell 3, ') for c, _ in why.values())
    states = {r: read_run(f'big/{r}')['steps']['2_two']['state'] for r in why}
    assert set(states.values()) == {'failed'}
    page = (lab.outputs/'big/report.html').read_text()
    assert '4 runs are not complete' in page and 'the numbers do not fit' in page and page.count('.partial-') >= 4
    progress = read_json(lab.outputs/'big/progress.json')
    assert progress['state'] == 'done' and progress['runs'] == dict(total=12, done=8, failed=4) and len(progress['failures']) == 4
    assert {r['run'] for r in lab.table('big') if r['state'] == 'failed'} == set(why)
    before = {n: read_run(f'big/{n}-s0')['steps']['2_two']['ended'] for n in fine}

    (lab.root/'bad').unlink()
    again, said = lab.batch(BIG.format('big', 1), workers=2)
    assert again['ran'] == 4 and len(again['done']) == 12 and not again['failures'], '\n'.join(said)
    assert before == {n: read_run(f'big/{n}-s0')['steps']['2_two']['ended'] for n in fine}
    lab.batch(BIG.format('clean', 0), name='clean', workers=2)
    assert (lab.outputs/'big/table.csv').read_bytes() == (lab.outputs/'clean/table.csv').read_bytes()
    assert not list(lab.outputs.rglob('*.partial-*')) and not list(lab.outputs.rglob('.now.json'))
    links = re.findall(r'href="([^"]+)"', (lab.outputs/'big/report.html').read_text())
    assert len([x for x in links if x.endswith('.ipynb')]) == 24 and all((lab.outputs/'big'/x).exists() for x in links)


# Shared steps

def test_shared_steps_run_once_and_their_records_are_true(lab):
    got, said = lab.batch('preset: toy\nseeds: [0, 1]\nseed_steps: [2_two]\ngrid: {2_two.n: [1, 2]}')
    assert got['ran'] == 5 and len(got['done']) == 4
    first, second = read_run('g/n1-s0')['steps']['1_one'], read_run('g/n2-s1')['steps']['1_one']
    assert second['shared_from'] == 'g/n1-s0' and not first.get('shared_from')
    assert (first['key'], first['files'], first['ended']) == (second['key'], second['files'], second['ended'])
    a, b = lab.outputs/'g/n1-s0/1_one', lab.outputs/'g/n2-s1/1_one'
    assert all((b/n).samefile(a/n) for n in ('out.json', 'ledger.json', '1_one.ipynb'))
    record = read_run('g/n2-s1')
    assert (record['batch'], record['seed'], record['varied'], record['base_preset']) == ('g', 1, {'2_two.n': 2}, 'toy')
    costs = list(csv.DictReader((lab.outputs/'g/costs.csv').open()))
    assert sum(c['step'] == '1_one' and not c['shared_from'] for c in costs) == 1 and len(costs) == 8
    short = batch_rows(lab.outputs/'g', 'summary.csv')
    assert [(r['run'], r['strict stage2 image']) for r in short] == [(r['run'], r['value']) for r in lab.table()] and len(short) == 4
    assert 'strict of stage2, image' in (lab.outputs/'g/report.html').read_text()

    (a/'out.json').unlink()                                  # the first run lost it; the others still have it
    got, _ = lab.batch('preset: toy\nseeds: [0, 1]\nseed_steps: [2_two]\ngrid: {2_two.n: [1, 2]}')
    assert got['ran'] == 0 and (a/'out.json').samefile(b/'out.json')


def test_a_shared_step_that_fails_is_the_cause_of_all(lab):
    lab.step('1_one', "raise OSError('no data today')")
    got, said = lab.batch('preset: toy\ngrid: {2_two.n: [1, 2]}\nretries: 1')
    assert got['ran'] == 1 and got['done'] == [] and {f['error'] for f in got['failures']} == {'OSError: no data today'}
    assert [f['step'] for f in got['failures']] == ['1_one']*2
    assert 'for 2 runs' in said[-4]


def test_a_retry_can_help(lab):
    lab.step('2_two', "p = run_dir(run)/'tried'\nif not p.exists():\n    p.write_text('')\n    raise ValueError('at first')\n" + SCORES)
    got, _ = lab.batch('preset: toy\nretries: 1')
    assert got['failures'] == [] and got['ran'] == 2
    assert lab.batch('preset: toy\nretries: 1', 'again')[0]['failures'] == []


def test_a_step_that_the_grid_drops_is_gone(lab):
    lab.batch('preset: toy')
    got, _ = lab.batch('preset: toy\nonly: [2]')           # now nothing makes what 2_two reads
    assert got['failures'] and 'out.json' in got['failures'][0]['error'] and not (lab.outputs/'g/s0/1_one').exists()
    assert list(read_run('g/s0')['steps']) == ['2_two']


def test_a_result_waits_for_the_folder_it_goes_into(lab, monkeypatch):
    "Data that runs share are ready while the own base of one of them is still being made in its folder."
    from llava_med.lab import workers
    patient = workers.patient_lock
    monkeypatch.setattr(workers, 'patient_lock', lambda run, owner, wait=1: patient(run, owner, wait))
    lab.step('0_base', "if n == 2: time.sleep(14)")
    lab.step('1_one')
    text = "preset: toy\nonly: [0_base, 1_one, 2_two]\nparameters: {2_two.tag: '{run}/0_base/model'}\ngrid: {0_base.n: [1, 2]}"
    got, said = lab.batch(text, workers=2)
    assert got['failures'] == [] and len(got['done']) == 2 and got['ran'] == 5, '\n'.join(said)


def test_a_run_that_breaks_the_machinery_stops_no_other(lab, monkeypatch):
    from llava_med.lab import workers
    run_step = workers.run_step
    def odd(run, *args, **how):
        if 'n1-' in run: raise KeyError('odd')
        return run_step(run, *args, **how)
    monkeypatch.setattr(workers, 'run_step', odd)
    got, said = lab.batch('preset: toy\nonly: [2]\nparameters: {2_two.tag: x}\ngrid: {2_two.n: [1, 2]}', workers=1)
    assert [f['error'] for f in got['failures'] if f['run'] == 'n1-s0'] == ["KeyError: 'odd'"]
    assert [f['run'] for f in got['failures']] == ['n1-s0', 'n2-s0'] and got['ran'] == 2   # n2 ran, and missed its input


def test_a_time_limit_holds_for_all_attempts_together(lab):
    lab.step('2_two', "open(os.environ['LLAVA_MED_ROOT'] + '/tried', 'a').write('x')\ntime.sleep(4)\nraise ValueError('again')")
    (lab.root/'tried').write_text('')
    got, _ = lab.batch('preset: toy\nretries: 5\ntimeout_min: 0.25')
    assert got['failures'] and len((lab.root/'tried').read_text()) < 6


# Nothing outlives its batch

@pytest.mark.parametrize('sign', [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_batch_takes_its_notebooks_with_it(lab, sign):
    lab.step('2_two', "open(os.environ['LLAVA_MED_ROOT'] + '/kernel', 'w').write(str(os.getpid()))\nif n == 1: time.sleep(100)\n" + SCORES)
    words = [*COMMAND, lab.grid('preset: toy\ngrid: {2_two.n: [1, 2]}'), '--workers', '1']
    p = subprocess.Popen(words, env=ENV | lab_env(lab), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for((lab.root/'kernel').exists, 90)
    family = psutil.Process(p.pid).children(recursive=True)
    p.send_signal(sign)
    out, err = p.communicate(timeout=60)
    wait_for(lambda: not any(map(alive, family)), 30)
    if sign == signal.SIGINT:
        assert p.returncode == 130 and 'Interrupted' in err
        assert read_json(lab.outputs/'g/progress.json')['state'] == 'interrupted'
        assert read_run('g/n1-s0')['steps']['2_two']['state'] == 'interrupted'
    lab.step('2_two', SCORES)
    got, _ = lab.batch('preset: toy\ngrid: {2_two.n: [1, 2]}')
    assert len(got['done']) == 2 and got['ran'] == 2, 'the first step is kept'


def test_a_merged_key_may_be_overridden():
    from llava_med.lab.presets import read_yaml
    text = 'base: &b {n: 1, m: 2}\ndeep: {list: [{inner: &p {<<: *b, n: 2}}]}\ntop: {<<: *p, n: 3}\n'
    assert read_yaml(text)['top'] == {'n': 3, 'm': 2} and read_yaml(text)['deep']['list'][0]['inner'] == {'n': 2, 'm': 2}
    with pytest.raises(Exception, match="the key 'n' stands twice"): read_yaml(text.replace('n: 3', 'n: 3, n: 4'))


def test_damaged_progress_is_a_sentence(tmp_path):
    from llava_med.ui.panels import batch_state
    for text in ('{}', '[]'):
        (tmp_path/'progress.json').write_text(text)
        with pytest.raises(ValueError, match='progress.json is damaged'): batch_state(tmp_path)


def test_a_notebook_of_an_earlier_call_is_ended(tmp_path):
    "A worker of a cluster may still run it when its batch was killed and called again; the pulse is then that of the later one."
    alive = tmp_path/'.alive'
    alive.write_text('first 1 1.0')
    p = subprocess.Popen(['sleep', '60'])
    guard = Guard(alive=alive, mark='first')
    guard.watch(p)
    time.sleep(1.2)
    assert p.poll() is None
    alive.write_text('second 2 2.0')
    assert p.wait(20) == -9 and guard.stopped and 'was called again' in guard.why


# On a cluster

@pytest.mark.slow
def test_a_worker_is_killed_and_its_runs_are_done_by_another(lab, tmp_path):
    marks = tmp_path/'marks'
    marks.mkdir()
    lab.step('2_two', f"open('{marks}/%s-%s' % (n, os.getpid()), 'w').close()\ntime.sleep(3)\n" + SCORES)
    text = 'preset: toy\ngrid: {2_two.n: [1, 2, 3, 4]}'
    with dask_processes(ENV, 2, tmp_path) as (address, workers):
        p = subprocess.Popen([*COMMAND, lab.grid(text), '--scheduler', address], env=ENV | lab_env(lab), stdout=subprocess.PIPE, text=True)
        below = lambda: {q.pid for q in psutil.Process(workers[0].pid).children(recursive=True)}
        wait_for(lambda: below() & {int(f.name.split('-')[1]) for f in marks.iterdir()}, 90)
        family = psutil.Process(workers[0].pid).children(recursive=True)
        workers[0].kill()
        wait_for(lambda: not any(map(alive, family)), 20)     # its notebook dies with it
        said = p.communicate(timeout=120)[0]
    assert p.returncode == 0 and '4 of 4 runs are complete' in said, said
    assert len(list(marks.iterdir())) >= 5, 'one run began twice'
    assert not list(lab.outputs.rglob('*.partial-*'))
    on_cluster = (lab.outputs/'g/table.csv').read_bytes()
    lab.batch(text, 'here', workers=2)
    assert on_cluster == (lab.outputs/'here/table.csv').read_bytes()


def test_workers_must_offer_the_gpus_that_a_grid_asks_for(lab, tmp_path, capsys):
    with dask_processes(ENV, 1, tmp_path, '--resources', 'GPU=1') as (address, _):
        assert main(['batch', lab.grid('preset: toy\ngpus: 2'), '--scheduler', address]) == 2
        assert 'offers 2 GPU' in capsys.readouterr().err and not lab.outputs.exists()
        got, _ = lab.batch('preset: toy\ngpus: 1', scheduler=address)
        assert got['failures'] == [] and got['ran'] == 2


# Numbers

def test_gpus_are_counted(monkeypatch):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '2,3')
    assert gpus_here() == ['2', '3']
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    assert gpus_here() == []
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '1,-1,0')
    assert gpus_here() == ['1']


def test_means_over_seeds():
    rows = [dict(run=f'a-s{i}', seed=i, state='done', case='a', metric='strict', value=v, low='', high='') for i, v in enumerate((.1, .2, .6))]
    one, = over_seeds(rows)
    assert abs(one['mean'] - .3) < 1e-9 and one['n_seeds'] == 3 and one['low'] < 0 < .9 < one['high'] and over_seeds(rows[:1])[0]['low'] is None


@pytest.mark.slow
def test_two_at_a_time_and_never_three(lab):
    "Runs that wait overlap in pairs."
    lab.step('2_two', "import time\nbegan = time.time()\ntime.sleep(3)\n(run_dir(run)/'2_two'/'span.txt').write_text(f'{began} {time.time()}')\n" + SCORES)
    lab.batch('preset: toy\ngrid: {2_two.n: [1, 2, 3, 4, 5, 6]}', 'pairs', workers=2)
    spans = [tuple(map(float, p.read_text().split())) for p in lab.outputs.glob('pairs/**/span.txt')]
    assert len(spans) == 6
    assert max(sum(a <= t < b for a, b in spans) for t, _ in spans) == 2


@pytest.mark.slow
def test_a_grid_of_the_real_pipeline(tmp_path, monkeypatch):
    (tmp_path/'two.yaml').write_text('preset: smoke\nseeds: [0, 1]\nseed_steps: [2_stage1_alignment, 3_stage2_tuning]\nonly: [1, 2, 3, 4]\nmemory_gb: 6\ntimeout_min: 20\n')
    got = run_batch(str(tmp_path/'two.yaml'), workers=1)
    assert got['failures'] == [] and got['ran'] == 7
    rows = list(csv.DictReader((got['folder']/'table.csv').open()))
    assert {r['model'] for r in rows} >= {'base', 'stage1', 'stage2'} and {r['seed'] for r in rows} == {'0', '1'}


def test_a_step_waits_for_all_that_it_depends_on(lab):
    "A step that names what step 0 of its run makes waits for that, and steps that do not need it go ahead."
    lab.step('0_base')
    grid = read_grid(lab.grid("preset: toy\nonly: [0_base, 1_one, 2_two]\nparameters: {2_two.tag: '{run}/0_base/model'}\ngrid: {1_one.n: [1, 2]}"))
    runs, tasks = lay_out(grid)
    keys = runs[0].keys
    assert set(tasks[keys['2_two']].before) == {keys['0_base'], keys['1_one']} and tasks[keys['1_one']].before == []
    got, _ = lab.batch("preset: toy\nonly: [0_base, 1_one, 2_two]\nparameters: {2_two.tag: '{run}/0_base/model'}\ngrid: {1_one.n: [1, 2]}", 'based')
    assert got['failures'] == [] and got['ran'] == 5   # 0_base once for both


# Rows that outlive a batch

GRID = 'preset: toy\nfinished: kept/rows.csv\ngrid: {2_two.n: [1, 2]}\nparameters: {1_one.lr: %s}'


def test_a_finished_run_is_not_run_again_on_another_machine(lab):
    got, said = lab.batch(GRID % 1e-3)
    rows = lab.root/'kept/rows.csv'
    with rows.open(newline='') as f: kept = {(r['arm'], r['metric']) for r in csv.DictReader(f)}
    ends = [f'2_two/stage2/image/strict{end}' for end in ('', '.low', '.high')]
    assert got['ran'] == 3 and kept >= {(f'n{n}', end) for n in (1, 2) for end in ends}, said
    shutil.rmtree(lab.outputs)   # as after a fresh clone
    again, said = lab.batch(GRID % 1e-3)
    assert again['ran'] == 0 and said == ['2 of 2 runs are finished: their rows stand in rows.csv.']
    changed, said = lab.batch(GRID % 2e-3)
    assert changed['ran'] == 3 and said[0] == 'n1-s0: its rows in rows.csv are stale (1_one.lr was 0.001 and is 0.002); it runs again.'


def test_a_run_that_fails_has_no_rows(lab):
    lab.step('2_two', "if n == 2: raise ValueError('no')\n" + SCORES)
    got, _ = lab.batch(GRID % 1e-3)
    assert len(got['failures']) == 1
    with (lab.root/'kept/rows.csv').open(newline='') as f: assert {r['arm'] for r in csv.DictReader(f)} == {'n1'}
    lab.step('2_two', SCORES)
    got, said = lab.batch(GRID % 1e-3)
    assert got['done'] == ['n2-s0'] and '1 of 2 runs are finished' in said[0]


@pytest.mark.parametrize('given', ['rows.txt', '[a]', '3'])
def test_a_file_of_finished_runs_is_a_csv(lab, given):
    with pytest.raises(ValueError, match='finished must name a CSV file'): lab.batch(f'preset: toy\nfinished: {given}')


def test_a_damaged_file_of_finished_runs_is_refused_before_anything_runs(lab):
    (lab.root/'kept').mkdir()
    (lab.root/'kept/rows.csv').write_text('arm,seed\nn1,0\n')
    with pytest.raises(ValueError, match='rows.csv, line 2: not a row of arm, seed, key'): lab.batch(GRID % 1e-3)
    assert not lab.outputs.exists() or not list(lab.outputs.glob('*/*/run.json'))
