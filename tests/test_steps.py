"Steps by name: a list in a preset, a notebook that runs twice, recipes that are imported first, and all that is refused."
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from conftest import PARAMETERS, Toy, make_notebook, wait_for
from llava_med.core import renames
from llava_med.core.runs import read_json, read_run
from llava_med.lab import estimate, rehearsal
from llava_med.lab.commands import scores_text
from llava_med.lab.tasks import lay_out
from llava_med.lab.grids import plan_grid, read_grid
from llava_med.lab.steps import UsageError, check_paths
from llava_med.lab.presets import as_planned, plan_run, presets, read_preset
from llava_med.lab.runner import started, step_inputs, step_key
from llava_med.lab.sweeps import run_batch

REPO = Path(__file__).resolve().parents[1]
HEAD = 'import os, time\nfrom llava_med.core.runs import Step, read_json, write_json'
MORE = PARAMETERS + "start_from: str = ''  # a model\nmodels: dict = {}  # models by name\n"
TUNE = """step = Step('2_two', run, inputs_from, seed, 'cpu')
start = read_json(f'{start_from}/w.json' if start_from else step.input('1_one', 'model/w.json'))
state = step.path('.checkpoint/state.json')
done = read_json(state) if state.exists() else []
for i in range(len(done), n):
    done.append(start[-1] + i)
    write_json(state, done)
    if os.path.exists(os.environ['LLAVA_MED_ROOT'] + '/slow') and i: time.sleep(120)
write_json(step.path('model/w.json'), start + done)
step.finish()"""
LIST = ('description: Two tunings.\nsteps:\n- 1_one\n- {name: first, notebook: 2_two, n: 2}\n'
        '- {name: again, notebook: pipeline/2_two.ipynb, n: 3, start_from: first}\n'
        '- {name: end, notebook: recipes/last, models: {a: first, b: again}}\n')


class Lists(Toy):
    "A repository whose notebooks use `Step`, and a preset that runs one of them twice."
    steps = ('1_one', '2_two')

    def __init__(self, folder, monkeypatch):
        super().__init__(folder, monkeypatch)
        one = "step = Step('1_one', run, inputs_from, seed, 'cpu')\nwrite_json(step.path('model/w.json'), [n])\nstep.finish()"
        last = ("step = Step('last', run, inputs_from, seed, 'cpu')\n"
                "write_json(step.path('out.json'), {k: read_json(f'{v}/w.json') for k, v in models.items()} | {'two': read_json(step.input('2_two', 'model/w.json'))})\nstep.finish()")
        for path, work in (('pipeline/1_one', one), ('pipeline/2_two', TUNE), ('recipes/last', last)):
            make_notebook(folder/f'nbs/{path}.ipynb', MORE, HEAD, work)
        self.preset('toy', LIST)


@pytest.fixture
def lists(tmp_path, monkeypatch): return Lists(tmp_path, monkeypatch)


def command(*words, wait=True):
    "`llava-med …` in a process of its own."
    code = "import sys\nimport llava_med.lab.runner as b\nfrom llava_med.lab.commands import main\nb.library_fingerprint = lambda nb: 'the same library'\nsys.exit(main())"
    p = subprocess.Popen([sys.executable, '-c', code, *words], env={**os.environ, 'PYTHONPATH': str(REPO)},
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    return p.communicate() if wait else p


# A notebook that runs twice

def test_a_list_is_planned(lists):
    plan = plan_run(read_preset('toy'), 'x')
    assert list(plan) == ['1_one', 'first', 'again', 'end'] and (plan['first']['n'], plan['again']['n']) == (2, 3)
    assert plan['again']['start_from'] == str(lists.outputs/'x/first/model')
    assert as_planned(plan['end'], 'x')['models'] == {'a': '{run}/first/model', 'b': '{run}/again/model'}
    assert list(plan_run(read_preset('toy'), 'x', only=['ag'], sets=['again.n=5'])) == ['again']


def test_a_notebook_runs_twice_is_killed_resumed_and_kept(lists, capsys):
    (lists.root/'slow').write_text('')
    p = command('run', 'toy', wait=False)
    state = lists.outputs/'toy/first/.checkpoint/state.json'
    try: wait_for(lambda: state.exists() and len(json.loads(state.read_text())) == 2, 120)
    finally: os.killpg(p.pid, signal.SIGKILL); p.communicate()
    assert lists.record()['first']['state'] == 'running' and not (lists.outputs/'toy/first/model').exists()
    (lists.root/'slow').unlink()
    time.sleep(1)
    assert lists.run('toy') == 0
    said = capsys.readouterr().out
    assert '1_one: unchanged, kept' in said and 'again: done' in said
    assert read_json(lists.outputs/'toy/first/model/w.json') == [1, 1, 2]
    assert read_json(lists.outputs/'toy/again/model/w.json') == [1, 1, 2, 2, 3, 4]
    out = read_json(lists.outputs/'toy/end/out.json')
    assert out == {'a': [1, 1, 2], 'b': out['two'], 'two': [1, 1, 2, 2, 3, 4]}, 'a notebook asks for another by its name: the last one before it'
    assert all((lists.outputs/f'toy/{s}/{s}.ipynb').exists() and (lists.outputs/f'toy/{s}/ledger.json').exists() for s in ('first', 'again', 'end'))
    assert not (lists.outputs/'toy/2_two').exists() and not (lists.outputs/'toy/last').exists()
    before = lists.ended()
    assert lists.run('toy') == 0 and lists.ended() == before
    time.sleep(1.1)
    assert lists.run('toy', '--set', 'again.n=1', '--only', '1_one', 'first', 'again') == 0
    after = lists.ended()
    assert [after[s] == before[s] for s in ('1_one', 'first', 'again')] == [True, True, False]


def test_the_key_of_a_step_covers_what_stands_before_it_in_the_list(lists):
    plan, record = plan_run(read_preset('toy'), 'x'), {'run': 'x', 'steps': {s: {'key': s} for s in ('1_one', 'first', 'again', 'end')}}
    record['notebooks'] = read_preset('toy')['notebooks']
    assert step_inputs('again', plan['again'], record)['before'] == {'1_one': '1_one', 'first': 'first'}
    same = {**record, 'steps': {}, 'notebooks': {'first': 'pipeline/2_two', 'other': 'pipeline/2_two'}}
    assert step_key(step_inputs('first', plan['first'], same)) != step_key(step_inputs('other', plan['first'], same)), 'its name is the folder that is shared'
    usual = {'run': 'x', 'steps': {}}
    assert step_inputs('1_one', plan['1_one'], usual) == step_inputs('1_one', plan['1_one'], {**record, 'steps': {}}), 'a list alone changes no key'


def test_a_list_that_is_gone_leaves_no_trace(lists):
    assert lists.run('toy', '--only', '1_one') == 0 and read_run('toy')['notebooks']
    lists.preset('toy', 'description: The plain pipeline.\n')
    assert lists.run('toy', '--only', '1_one') == 0 and read_run('toy')['notebooks'] is None
    lists.preset('plain', 'description: The plain pipeline.\n')
    assert lists.run('plain', '--only', '1_one') == 0 and 'notebooks' not in read_run('plain')


# What is refused before anything runs

@pytest.mark.parametrize('text, says', [
    ('steps: [1_oen]', 'no notebook (odd.yaml) named \'1_oen\'. Did you mean 1_one? Known: 1_one, 2_two, recipes/last.'),
    ('steps: [recipes/lsat]', 'Did you mean recipes/last?'),
    ('steps: [1_one, 1_one]', 'two steps are named 1_one'),
    ('steps: [1_one, {name: A, notebook: 2_two}, {name: a, notebook: 2_two}]', 'two steps are named a'),
    ('steps: [1_one, {name: a, notebook: 2_two, start_from: a}]', 'a.start_from is a, which is the step itself: name one that comes before (1_one).'),
    ('steps: [{name: a, notebook: 2_two, start_from: b}, {name: b, notebook: 2_two}]', 'a.start_from is b, which is a later step'),
    ('steps: [{name: a, notebook: 2_two, models: {x: a}}]', 'a.models is a, which is the step itself'),
    ("steps: [{name: a, notebook: 2_two, tag: '{run}/b/model'}, {name: b, notebook: 2_two}]", 'which is a later step'),
    ('steps: [1_one, {name: a, notebook: 2_two, start_from: 1_onee}]', 'no earlier step, nor a folder, (a.start_from) named \'1_onee\'. Did you mean 1_one?'),
    ('steps: [{name: a, notebook: 2_two, m: 1}]', "no parameter of a named 'm'"),
    ('steps: [{name: a, notebook: 2_two, n: many}]', 'a.n (a number) must be of type int'),
    ('steps: [{name: a, notebook: 2_two, n: 1}]\nparameters: {a: {n: 2}}', 'stands under `steps:` and under `parameters:`'),
    ('steps: [{name: a, notebook: 2_two}]\nparameters: {2_two: {n: 2}}', "named '2_two'. Known: a."),
    ('steps: [{n: 1}]', 'says neither `name:` nor `notebook:`'),
    ('steps: [{name: a.b, notebook: 2_two}]', "'a.b' cannot name a step"), ('steps: [{name: all, notebook: 2_two}]', "'all' cannot name a step"),
    ('steps: [{name: 1_one, notebook: 2_two}]', 'has the name of another notebook'),
    ('steps: {a: 2_two}', 'must be a list'), ('steps: []', 'must be a list'),
    ('steps: [../pipeline/1_one]', 'no notebook'), ('steps: [/etc/passwd]', 'no notebook'),
    ('recipes: [llava_med.recipes.stduy]', 'no recipe module (odd.yaml) named \'llava_med.recipes.stduy\'. Did you mean llava_med.recipes.study?'),
    ('recipes: llava_med.recipes.study', 'must be a list of modules'), ('recipes: [7]', 'no recipe module'),
])
def test_a_wrong_list_runs_nothing(lists, capsys, text, says):
    lists.preset('odd', text)
    assert lists.run('odd') == 2
    err = capsys.readouterr().err
    assert says in err and len(err.strip().splitlines()) == 1 and not lists.outputs.exists()


@pytest.mark.parametrize('words, says', [
    (['--only', '2_two'], "no step named '2_two'. Known: 1_one, first, again, end."), (['--set', '2_two.n=1'], 'Known: 1_one, first, again, end.'),
    (['--set', 'first.start_from=again'], 'a later step'), (['--set', 'first.nn=2'], 'Did you mean n?'),
])
def test_a_wrong_word_about_a_list_runs_nothing(lists, capsys, words, says):
    assert lists.run('toy', *words) == 2
    assert says in capsys.readouterr().err and not lists.outputs.exists()


def test_a_wrong_stage_is_refused(lists, capsys):
    make_notebook(lists.notebook('2_two'), MORE + 'stage: dict = {}  # changes of the stage\n', HEAD, TUNE)
    for stage, says in (('objective: dop', "no objective named 'dop'"), ('sampler: dop', 'no sampler named'), ('trainable: []', 'nothing learns'),
                        ('trainable: [projecter]', 'Did you mean projector?'), ('epoch: 1', "no field 'epoch'")):
        lists.preset('odd', f'steps: [{{name: a, notebook: 2_two, stage: {{{stage}}}}}]')
        assert lists.run('odd') == 2
        err = capsys.readouterr().err
        assert 'a.stage: ' in err and says in err and len(err.strip().splitlines()) == 1 and not lists.outputs.exists()
    lists.preset('fine', 'steps: [{name: a, notebook: 2_two, stage: {lr: 1.}}]')
    assert plan_run(read_preset('fine'), 'x')['a']['stage'] == {'lr': 1.}


# Recipes

def test_recipes_are_imported_first_and_belong_to_the_key(lists, monkeypatch, capsys):
    here = lists.root/'mine'
    here.mkdir()
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(here), str(REPO)]))
    (here/'toy_recipe.py').write_text("import llava_med.core.registry as r\nr.FROM_RECIPE = 5\n")
    work = "step = Step('1_one', run, inputs_from, seed, 'cpu')\nwrite_json(step.path('model/w.json'), [seen])\nstep.finish()"
    make_notebook(lists.notebook('1_one'), MORE, 'import llava_med.core.registry as r\nseen = r.FROM_RECIPE\n' + HEAD, work)
    lists.preset('with', 'recipes: [toy_recipe]\nsteps: [1_one]')
    assert lists.run('with') == 0 and read_json(lists.outputs/'with/1_one/model/w.json') == [5]
    executed = nbformat.read(lists.outputs/'with/1_one/1_one.ipynb', 4)
    assert "import_recipes(['toy_recipe'])" in executed.cells[0].source, 'whoever reads it sees what was imported'
    first = lists.ended('with')
    assert lists.run('with') == 0 and lists.ended('with') == first
    time.sleep(1.1)
    (here/'toy_recipe.py').write_text("import llava_med.core.registry as r\nr.FROM_RECIPE = 6\n")
    assert lists.run('with') == 0 and lists.ended('with') != first and read_json(lists.outputs/'with/1_one/model/w.json') == [6]
    (here/'toy_recipe.py').write_text("raise ValueError('a recipe that is broken')\n")
    assert lists.run('with') == 1 and 'a recipe that is broken' in capsys.readouterr().err


# Grids

def test_a_grid_over_named_steps(lists):
    (lists.root/'g.yaml').write_text('preset: toy\nonly: [1_one, first, again]\ngrid: {again.n: [1, 2], again.start_from: [first, 1_one]}')
    grid = read_grid(str(lists.root/'g.yaml'))
    runs, units = lay_out(grid)
    assert len(runs) == 4 and len(units) == 6, 'what comes before is run once'
    assert {as_planned(r.plan['again'], f'g/{r.name}')['start_from'] for r in runs} == {'{run}/first/model', '{run}/1_one/model'}
    got = run_batch(str(lists.root/'g.yaml'), say=lambda line: None)
    assert not got['failures'] and got['ran'] == 6
    ends = {r.name: read_json(lists.outputs/f'g/{r.name}/again/model/w.json') for r in runs}
    assert sorted(ends.values()) == [[1, 1], [1, 1, 2], [1, 1, 2, 2], [1, 1, 2, 2, 3]]
    for r in runs:
        record = read_run(f'g/{r.name}')
        assert list(record['notebooks']) == ['1_one', 'first', 'again', 'end']
        assert all(step_key(step_inputs(s, r.plan[s], record)) == k == record['steps'][s]['key'] for s, k in r.keys.items())
    assert run_batch(str(lists.root/'g.yaml'), say=lambda line: None)['ran'] == 0


@pytest.mark.parametrize('text, says', [
    ('preset: toy\ngrid: {2_two.n: [1]}', 'Known: 1_one, first, again, end.'), ('preset: toy\ngrid: {first.start_from: [again]}', 'a later step'),
    ('preset: toy\ngrid: {again.nn: [1]}', 'Did you mean n?'), ('preset: toy\nonly: [2]', "no step named '2'"),
    ("preset: toy\nonly: [again]\nparameters: {again.start_from: first}", 'none of the steps of the run'),
])
def test_a_wrong_grid_over_named_steps(lists, text, says):
    (lists.root/'odd.yaml').write_text(text)
    with pytest.raises(UsageError) as e: plan_grid(read_grid(str(lists.root/'odd.yaml')))
    assert says in str(e.value)


# What a run reads

@pytest.mark.parametrize('words,says', [
    (['--set', '3b_vqa_tuning.vqa=nowhere/'], '3b_vqa_tuning is not among the steps to run'),
    (['--only', '3b', '--set', '3b_vqa_tuning.vqa=nowhere/'], '3b_vqa_tuning.vqa is nowhere/, and there is no such file or folder. Correct it'),
    (['--set', '1_data_prep.articles=[README.md, none.tar.gz]', '--set', '4_evaluation.vqa=none'], 'articles is none.tar.gz, and there is no such file or folder. The same is wrong with 4_evaluation.vqa.'),
    (['--set', '3_stage2_tuning.start_from=data/none'], 'start_from is data/none, and there is no such folder.'), (['--set', 'all.base_model=~/no_model'], f'{Path.home()}/no_model, and there is no such folder'),
    (['--set', '2_stage1_alignment.base_model=README.md'], 'a file, where a folder is needed'), (['--set', '3_stage2_tuning.data=data'], 'a folder, where a file is needed'),
    (['--set', '3_stage2_tuning.data=settings.ini'], '3_stage2_tuning.data: .*settings.ini'), (['--set', '4_evaluation.models={a: outputs/none/model}'], '4_evaluation.models is outputs/none/model'),
    (['--only', '3', '--set', '3_stage2_tuning.start_from=2_stage1_alignment'], 'The step 2_stage1_alignment of this run makes it: run that first')])
def test_every_path_is_looked_for_before_the_first_step(tmp_path, capsys, words, says):
    from llava_med.lab.commands import main
    assert main(['run', 'tiny', '--name', 'paths', '--anyway', *words]) == 2
    said = capsys.readouterr().err
    assert re.search(says, said) and 'Traceback' not in said and ('git checkout' in said) == ('base_tiny' in said), said
    assert not (tmp_path/'outputs/paths').exists()


def test_paths_of_home_and_of_steps_before_pass(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path/'base').mkdir()
    (tmp_path/'base/config.json').write_text('{}')
    recipe = read_preset('tiny')
    plan = plan_run(recipe, 'x', sets=['all.base_model=~/base', '3_stage2_tuning.start_from=2_stage1_alignment'])
    assert plan['5_attention']['base_model'] == str(tmp_path/'base')
    check_paths(plan, 'x')
    made = plan_run(recipe, 'x', ['0', '2'], ['0_base_model.publish=data/new', '2_stage1_alignment.base_model=data/new'])
    check_paths(made, 'x')
    with pytest.raises(UsageError, match='is data/new, and there is no such folder'): check_paths({'2_stage1_alignment': made['2_stage1_alignment']}, 'x')


def test_a_file_of_conversations_is_opened_before_the_first_step(tmp_path, capsys):
    from llava_med.lab.commands import main
    row = dict(video='v.mp4', conversations=[{'from': 'human', 'value': '<video>\nWhat?'}, {'from': 'gpt', 'value': 'a'}])
    (tmp_path/'t.json').write_text(json.dumps([row]))
    assert main(['run', 'tiny', '--name', 'paths', '--anyway', '--set', f'3_stage2_tuning.data={tmp_path}/t.json']) == 2
    said = capsys.readouterr().err
    assert '3_stage2_tuning.data: ' in said and 'no record can be used' in said and '1 × names a video' in said and not (tmp_path/'outputs/paths').exists()


def test_a_grid_looks_for_every_path_first(lists, capsys):
    from llava_med.lab.commands import main
    grid = lists.root/'g.yaml'
    grid.write_text('preset: toy\ngrid: {again.n: [2, 3]}\nparameters: {first.start_from: data/none}\n')
    assert main(['batch', str(grid)]) == 2
    assert 'g.yaml: first.start_from is data/none, and there is no such folder.' in capsys.readouterr().err and not lists.outputs.exists()


# By hand

def test_plain_papermill_refuses_what_a_notebook_does_not_have(lists, monkeypatch):
    import papermill
    monkeypatch.setenv('PYTHONPATH', str(REPO))
    out = lists.root/'out.ipynb'
    one = str(lists.notebook('1_one'))
    run = lambda **values: started(lambda **own: papermill.execute_notebook(one, str(out), values, kernel_name='python3',
                                                                          progress_bar=False, **own))
    with pytest.raises(papermill.PapermillExecutionError, match="1_one has no parameter 'm'.*Known: run, inputs_from"): run(m=2)
    run(n=3)
    assert read_json(lists.outputs/'scratch/1_one/model/w.json') == [3]


def by_papermill(lists, monkeypatch, parameter, written):
    "A call of plain papermill on a step with one more parameter; it writes what `written` says."
    import papermill
    monkeypatch.setenv('PYTHONPATH', str(REPO))
    work = f"step = Step('1_one', run, inputs_from, seed, 'cpu')\nwrite_json(step.path('n.json'), {written})\nstep.finish()"
    book = make_notebook(lists.notebook('1_one'), HEAD, MORE + parameter, work, tags=())
    nb = nbformat.read(book, 4)
    nb.cells[1].metadata['tags'] = ['parameters']
    nbformat.write(nb, book)
    return lambda **values: started(lambda **own: papermill.execute_notebook(str(book), str(lists.root/'out.ipynb'), values,
                                                                             kernel_name='python3', progress_bar=False, **own))


def test_plain_papermill_takes_an_old_name(lists, monkeypatch):
    import papermill
    run = by_papermill(lists, monkeypatch, 'n_val: int = 1  # samples', 'n_val')
    run(n_held=3)
    assert read_json(lists.outputs/'scratch/1_one/n.json') == 3
    with pytest.raises(papermill.PapermillExecutionError, match='1_one: n_held is now called n_val, and both are given'): run(n_held=3, n_val=4)


def test_plain_papermill_gives_values_their_kinds(lists, monkeypatch):
    import papermill
    run = by_papermill(lists, monkeypatch, 'packed: bool = True  # rows', '[packed, lr, n, tag, files]')
    run(packed='false', lr='2e-3', n='4', tag='7', files='[a, b]')
    assert read_json(lists.outputs/'scratch/1_one/n.json') == [False, 2e-3, 4, '7', ['a', 'b']]
    kept = (lists.outputs/'scratch/1_one/n.json').stat().st_mtime_ns
    for values, says in ((dict(packed='perhaps'), "packed must be of type bool, and 'perhaps' is str"), (dict(n=2.5), 'n must be of type int, and 2.5 is float'),
                         (dict(tag=7), 'tag must be of type str, and 7 is int .papermill takes a text as it is with -r')):
        with pytest.raises(papermill.PapermillExecutionError, match=says): run(**values)
        ran = nbformat.read(lists.root/'out.ipynb', 4).cells
        assert [c.execution_count for c in ran if c.source.startswith('step = Step(')] == [None], 'the parameters cell itself fails'
    assert (lists.outputs/'scratch/1_one/n.json').stat().st_mtime_ns == kept


def test_values_are_checked_where_the_imports_come_late():
    cells = [PARAMETERS, "# Parameters\nn = '3'\nlr = 1\n", HEAD]
    renames.check_injected(cells, '1_one', dict(n=3, lr=1))
    with pytest.raises(ValueError, match="1_one: n is the text '3', and means 3: give that"): renames.check_injected(cells, '1_one', dict(n='3', lr=1))
    with pytest.raises(ValueError, match="1_one: n must be of type int, and 'x' is str"): renames.check_injected(cells, '1_one', dict(n='x', lr=1))


def test_an_old_name_is_told_and_still_works(lists, monkeypatch, capsys):
    monkeypatch.setitem(renames.RENAMED, 'number', 'n')
    renames._say.cache_clear()   # it is said once a process
    assert plan_run(read_preset('toy'), 'x', sets=['first.number=7'])['first']['n'] == 7
    assert 'number is now called n; the old name works in this version only.' in capsys.readouterr().err
    lists.preset('old', 'steps: [{name: a, notebook: 2_two, number: 4}]\n')
    assert plan_run(read_preset('old'), 'x')['a']['n'] == 4
    (lists.root/'old.yaml').write_text('preset: toy\ngrid: {first.number: [1, 2]}\nparameters: {again: {number: 5}}')
    runs = plan_grid(read_grid(str(lists.root/'old.yaml')))
    assert [(r.name, r.plan['again']['n']) for r in runs] == [('n1-s0', 5), ('n2-s0', 5)]


@pytest.mark.parametrize('old', ['steps: [{name: a, notebook: 2_two, number: 4, n: 4}]', 'steps: [{name: a, notebook: 2_two, number: 4}]\nparameters: {a: {n: 4}}',
                                 'steps: [2_two]\nparameters: {2_two: {number: 4, n: 4}}'])
def test_both_names_of_a_parameter_are_refused(lists, monkeypatch, old):
    monkeypatch.setitem(renames.RENAMED, 'number', 'n')
    lists.preset('old', old + '\n')
    with pytest.raises(UsageError, match='number is now called n, and both are given|a.n stands under'): plan_run(read_preset('old'), 'x')


def test_both_names_in_arguments_and_grids_are_refused(lists, monkeypatch):
    monkeypatch.setitem(renames.RENAMED, 'number', 'n')
    with pytest.raises(UsageError, match='--set first.number is now called n, and both are given'):
        plan_run(read_preset('toy'), 'x', sets=['first.number=7', 'first.n=8'])
    assert plan_run(read_preset('toy'), 'x', sets=['first.number=7', 'again.n=8'])['again']['n'] == 8
    for text in ('parameters: {first: {number: 1, n: 2}}', 'parameters: {first.number: 1, first.n: 2}', 'grid: {first.number: [1], first.n: [2]}'):
        (lists.root/'both.yaml').write_text(f'preset: toy\n{text}')
        with pytest.raises(UsageError, match='both are given|stands twice'): read_grid(str(lists.root/'both.yaml'))


def test_fields_of_a_stage_have_old_names_too():
    preset = read_preset('tiny')
    said = '3_stage2_tuning.stage={parts: [projector, language_model], rates: {projector: 1e-4}, clip: 2.0}'
    assert plan_run(preset, 'x', sets=[said])['3_stage2_tuning']['stage'] == {
        'trainable': ['projector', 'language_model'], 'learning_rates': {'projector': 1e-4}, 'max_grad_norm': 2.}
    with pytest.raises(UsageError, match='3_stage2_tuning.stage.clip is now called max_grad_norm, and both are given'):
        plan_run(preset, 'x', sets=['3_stage2_tuning.stage={clip: 1.0, max_grad_norm: 2.0}'])


# Presets in folders

def test_presets_stand_in_folders(lists, capsys):
    for folder in ('recipes', 'more'): (lists.root/f'nbs/pipeline/presets/{folder}').mkdir()
    lists.preset('recipes/dpo', 'steps: [1_one]\n')
    assert list(presets()) == ['toy', 'recipes/dpo']
    assert read_preset('dpo')['owner'] == read_preset('recipes/dpo')['owner'] == 'recipes/dpo' and read_preset('dpo')['name'] == 'dpo'
    assert lists.run('dpo') == 0 and read_run('dpo')['preset'] == 'recipes/dpo'
    assert lists.run('recipes/dpo') == 0
    lists.preset('more/dpo', 'steps: [1_one]\n')
    with pytest.raises(UsageError, match="several presets named 'dpo': write more/dpo or recipes/dpo"): read_preset('dpo')
    assert lists.run('more/dpo') == 1 and "was made by the preset 'recipes/dpo'" in capsys.readouterr().err
    with pytest.raises(UsageError, match='Known: toy, more/dpo, recipes/dpo'): read_preset('dop_')


# The real notebooks

SECOND = '''description: Stage 2 twice.
steps:
- 1_data_prep
- 2_stage1_alignment
- 3_stage2_tuning
- {name: tune2, notebook: 3_stage2_tuning, start_from: 3_stage2_tuning, epochs: 1, lora_rank: 2}
- 4_evaluation
model: {checkpoint: data/base_tiny}
hardware: {gpus: 0, memory_gb: 4}
data: {3_stage2_tuning: {rows: 10, text_tokens: 100, scored_tokens: 50}}
'''


def test_a_second_tuning_is_planned_and_rehearsed(tmp_path):
    (tmp_path/'second.yaml').write_text(SECOND)
    preset = read_preset(str(tmp_path/'second.yaml'))
    plan = estimate.make_plan(preset)
    assert list(plan['stages']) == ['2_stage1_alignment', '3_stage2_tuning', 'tune2'] and set(plan['stages']['tune2']['learn']) == {'projector', 'adapter'}
    assert 'tune2: trains' in estimate.plan_text(preset, plan) and plan['others'] == ['1_data_prep', '4_evaluation']
    values = rehearsal.rehearsal_values(preset, Path('/thin'))
    assert values['tune2']['start_from'] == '{run}/3_stage2_tuning/model' and values['2_stage1_alignment']['base_model'] == '/thin'
    written = tmp_path/'again.yaml'
    written.write_text(json.dumps({'parameters': values, **rehearsal.steps_text(preset)}))
    assert list(plan_run(read_preset(str(written)), 'x')) == list(plan_run(preset, 'x'))


def test_the_parts_that_a_stage_names_are_counted():
    assert estimate.trained_parts('3_stage2_tuning') == ('projector', 'language_model') and estimate.trained_parts('dpo') == ()
    assert estimate.trained_parts('dpo', {'stage': {'trainable': ['last_block']}}) == ('last_block',)


def test_every_evaluation_of_a_run_is_shown(tmp_path):
    for s in ('4_evaluation', 'late'):
        (tmp_path/s).mkdir()
        (tmp_path/s/'scores.csv').write_text('model,dataset,split,condition,slice,metric,value,low,high,n_items,n_images,n_clusters\nstage2,toy,test,image,all,strict,.5,,,4,4,4\n')
    (tmp_path/'run.json').write_text(json.dumps({'notebooks': {'4_evaluation': 'pipeline/4_evaluation', 'late': 'pipeline/4_evaluation'}}))
    text = scores_text(tmp_path, {'4_evaluation': 1, 'late': 'kept'})
    assert text.count('strict accuracy') == 2 and 'late\n' in text
    (tmp_path/'run.json').unlink()
    table = scores_text(tmp_path, {'4_evaluation': 1})
    assert table.startswith('\nstrict accuracy') and 'late' not in table
