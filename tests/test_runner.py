"The runner on a toy pipeline, under everything that makes a run look better than it was."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from conftest import HEAD, PARAMETERS, make_notebook, wait_for
from llava_med.lab.runner import OUTCOME_MARK
from llava_med.lab.presets import plan_run, read_preset
from llava_med.lab.commands import main
from llava_med.lab.publishing import refresh
from llava_med.core.runs import RunLocked, Step, StepInputError, read_run, run_dir, update_run

REPO = Path(__file__).resolve().parents[1]
SAME = "import sys\nimport llava_med.lab.runner as b\nimport llava_med.lab.commands as c\nb.library_fingerprint = lambda nb: 'the same library'\n"  # as the fixture does
COMMAND = [sys.executable, '-c', SAME + 'sys.exit(c.main())', 'run']


def start(*words):
    "The command in a process of its own, in a process group of its own."
    return subprocess.Popen([*COMMAND, *words], env={**os.environ, 'PYTHONPATH': str(REPO)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, start_new_session=True)


def sleeper(toy, seconds=120):
    "A second step that says where its kernel is and then works for a long time."
    toy.step('2_two', f"open(run_dir(run)/'kernel.txt', 'w').write(str(os.getpid()))\ntime.sleep({seconds})")
    return toy.outputs/'toy/kernel.txt'


def family(pid): return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


# What is asked for is checked before anything runs

@pytest.mark.parametrize('words, says', [
    (['--set', '2_two.larning=1'], 'Known: seed, lr, n, tag, files'),
    (['--set', '2_two.nn=1'], 'Did you mean n?'),
    (['--set', '2_tow.n=1'], 'Did you mean 2_two? Known: 1_one, 2_two, 3_three'),
    (['--set', '2_two.n=many'], 'must be of type int'),
    (['--set', '2_two.n=1.5'], 'must be of type int'),
    (['--set', '2_two.n=true'], 'must be of type int'),
    (['--set', '2_two.lr=fast'], 'must be of type float'),
    (['--set', '2_two.files=a'], 'must be of type list'),
    (['--set', '2_two.run=other'], '--name'),
    (['--set', 'n=1'], 'STEP.PARAM=VALUE'),
    (['--only', '4'], 'Known: 1_one, 2_two, 3_three'),
    (['--only', '1', '--set', '2_two.n=1'], 'not among the steps'),
    (['--name', '../elsewhere'], 'cannot name a run'),
])
def test_wrong_command_runs_nothing(toy, capsys, words, says):
    code = toy.run('toy', *words)
    err = capsys.readouterr().err
    assert code == (1 if '--name' in words else 2) and says in err
    assert len(err.strip().splitlines()) == 1, 'one sentence, no traceback'
    assert not toy.outputs.exists()


@pytest.mark.parametrize('text, says', [
    ('parameters: {4_four: {n: 1}}', 'Known: 1_one, 2_two, 3_three'),
    ('parameters: {2_two: {m: 1}}', 'Known: seed, lr'),
    ('parameters: {2_two: {n: "1"}}', 'must be of type int'),
    ('paramters: {}', 'Did you mean parameters?'),
    ('parameters: {2_two: {n: 1}, 2_two: {n: 2}}', 'stands twice'),
    ('parameters: {2_two: [n]}', 'must hold'),
    ('parameters: [n]', 'one line per step'),
    ('parameters: {4: {n: 1}}', 'Known: 1_one, 2_two, 3_three'),
    ('parameters: {2_two: {n: 1', 'not valid YAML'),
    ('- a list', 'must hold'),
])
def test_wrong_preset_runs_nothing(toy, capsys, text, says):
    toy.preset('odd', text)
    assert toy.run('odd') == 2
    assert says in capsys.readouterr().err
    assert not toy.outputs.exists()


def test_a_preset_that_is_no_text_is_named(toy, capsys):
    (toy.root/'nbs/pipeline/presets/odd.yaml').write_bytes(b'\xff\xfe\x00')
    assert toy.run('odd') == 2
    assert 'odd.yaml is not UTF-8 text' in capsys.readouterr().err
    assert not toy.outputs.exists()


@pytest.mark.parametrize('tags', [(), ('parameters-not',)])
def test_lost_tag_is_refused(toy, capsys, tags):
    toy.step('3_three', tags=tags)
    assert toy.run('toy') == 2
    assert '3_three.ipynb has 0 cells tagged' in capsys.readouterr().err
    assert not toy.outputs.exists()


def test_two_tagged_cells_are_refused(toy, capsys):
    nb = nbformat.read(toy.notebook('1_one'), 4)
    nb.cells[1].metadata['tags'] = ['parameters']
    nbformat.write(nb, toy.notebook('1_one'))
    assert toy.run('toy') == 2
    assert 'has 2 cells tagged' in capsys.readouterr().err


def test_usage_errors_of_the_parser_are_2(capsys):
    with pytest.raises(SystemExit) as e: main(['run'])
    assert e.value.code == 2


# Values arrive as what they are

@pytest.mark.parametrize('name', ['2_two-Copy1', '2_two_copy', '2_two (1)'])
def test_a_copy_of_a_notebook_is_no_step(toy, capsys, name):
    toy.run('toy')
    before = toy.out('2_two')
    stamp = (toy.outputs/'toy/2_two/out.json').stat().st_mtime_ns
    toy.notebook(name).write_text(toy.notebook('2_two').read_text())
    capsys.readouterr()
    assert toy.run('toy', '--set', '3_three.n=2') == 0 and toy.out('2_two') == before and (toy.outputs/'toy/2_two/out.json').stat().st_mtime_ns == stamp
    assert f'{name}.ipynb is a copy and does not run' in capsys.readouterr().out and not (toy.outputs/'toy'/name).exists()
    assert toy.run('toy', '--only', '2') == 0, 'the copy does not make the number ambiguous'


def test_a_copy_that_a_preset_names_has_its_own_folder(toy, monkeypatch):
    work = "from llava_med.core.runs import Step\nstep = Step('2_two', run, inputs_from, seed, 'cpu')\nwrite_json(step.path('out.json'), n)\nstep.finish()"
    for name in ('2_two', '2_two-Copy1'): make_notebook(toy.notebook(name), PARAMETERS, HEAD, work)
    toy.preset('both', 'description: x\nsteps: [2_two, {notebook: 2_two-Copy1, n: 5}]\n')
    assert toy.run('both') == 0 and (toy.out('2_two', 'both'), toy.out('2_two-Copy1', 'both')) == (1, 5)


def test_values_arrive(toy):
    toy.preset('toy', 'parameters:\n  1_one: {lr: 2e-5, files: [x, 3e2]}\n  all: {n: 4}\n  3_three: {n: 5}\n')
    assert toy.run('toy', '--set', '2_two.lr=2e-5', '2.tag=007', '--set', '3_three.lr=1') == 0
    one, two, three = (toy.out(s) for s in toy.steps)
    assert one['lr'] == two['lr'] == 2e-5 and isinstance(three['lr'], float) and three['lr'] == 1.0
    assert one['files'] == ['x', 300.0] and two['tag'] == '007'
    assert (one['n'], two['n'], three['n']) == (4, 4, 5)
    assert three['before']['before']['lr'] == 2e-5, 'each step reads the one before'
    assert Path(one['python']).parent == Path(sys.executable).parent, 'the kernel is of this environment'
    record = toy.record()
    assert record['1_one']['parameters']['lr'] == 2e-5 and 'run' not in record['1_one']['parameters']


def test_paths_of_the_command_line_mean_what_the_shell_means(toy, monkeypatch):
    here = toy.root/'elsewhere'
    (here/'mine').mkdir(parents=True)
    monkeypatch.chdir(here)
    plan = plan_run(read_preset('toy'), 'toy', sets=['1_one.files=[mine/]'])
    assert plan['1_one']['files'] == ['mine/'] or Path(plan['1_one']['files'][0]) == here/'mine'
    assert Path(plan['1_one']['files'][0]).is_absolute()


def test_optional_steps_run_only_when_named(toy):
    toy.step('0_base'), toy.step('2b_extra')
    usual = ['1_one', '2_two', '3_three']
    assert list(plan_run(read_preset('toy'), 'toy')) == usual
    assert list(plan_run(read_preset('toy'), 'toy', only=['0_base'])) == ['0_base']
    toy.preset('more', 'parameters: {2b_extra: {}}')
    assert list(plan_run(read_preset('more'), 'more')) == ['1_one', '2_two', '2b_extra', '3_three']


# Success is what the runner saw, not what the notebook says

@pytest.mark.parametrize('work, says', [
    ('sys.exit(3)', 'SystemExit'),
    ('raise ValueError("line one\\nthe last line")', 'ValueError: the last line'),
    ('raise KeyboardInterrupt', 'KeyboardInterrupt'),
    ('raise OSError(28, "No space left on device")', 'The disk is full (No space left on device): free some space, or set LLAVA_MED_OUTPUTS'),
    ('raise RuntimeError("Error while serializing: No space left on device (os error 28)\\nsecond line")', 'The disk is full'),
    ('raise OSError(2, "No such file")', 'FileNotFoundError: [Errno 2]'),
    ('import signal\nos.kill(os.getppid(), 9)\ntime.sleep(30)', 'was killed'),   # papermill itself
])
def test_failure_is_one_sentence(toy, capsys, work, says):
    toy.step('1_one', work)
    assert toy.run('toy') == 1
    err = capsys.readouterr().err
    assert err.startswith('llava-med: 1_one failed') and says in err and len(err.strip().splitlines()) == 1
    assert toy.record()['1_one']['state'] == 'failed' and '2_two' not in toy.record()


def test_killed_kernel_is_not_success(toy, capsys):
    assert toy.run('toy', '--only', '1', '2') == 0
    toy.step('2_two', 'os.kill(os.getpid(), 9)')
    assert toy.run('toy') == 1
    err = capsys.readouterr().err
    assert err.startswith('llava-med: 2_two failed') and 'memory' in err and len(err.strip().splitlines()) == 1
    partial, = (toy.outputs/'toy/2_two').glob('*.partial-*.ipynb')
    assert partial.name in err and nbformat.read(partial, 4).cells
    assert not (toy.outputs/'toy/2_two/2_two.ipynb').exists(), 'neither a new one nor that of the earlier success'
    assert toy.record()['2_two']['state'] == 'failed' and '3_three' not in toy.record()
    toy.step('2_two')
    assert toy.run('toy', '--only', '2') == 0
    assert not list((toy.outputs/'toy/2_two').glob('*.partial-*'))


def test_a_step_without_ledger_is_not_done(toy, capsys):
    toy.step('1_one', ledger=False)
    assert toy.run('toy') == 1
    assert 'step.finish()' in capsys.readouterr().err


# Unchanged steps are kept

def test_unchanged_is_kept_and_changes_travel_down(toy):
    assert toy.run('toy') == 0
    first = toy.ended()
    began = time.time()
    time.sleep(1.1)                                     # times are in whole seconds
    assert toy.run('toy') == 0
    assert toy.ended() == first and time.time() - began < 10

    assert toy.run('toy', '--set', '2_two.n=2') == 0
    second = toy.ended()
    assert [second[s] == first[s] for s in toy.steps] == [True, False, False]
    assert toy.out('3_three')['before']['n'] == 2

    time.sleep(1.1)
    nb = nbformat.read(toy.notebook('3_three'), 4)      # outputs are no change, code is
    nb.cells[2].outputs = [nbformat.v4.new_output('stream', text='old')]
    nbformat.write(nb, toy.notebook('3_three'))
    assert toy.run('toy', '--set', '2_two.n=2') == 0 and toy.ended() == second
    nb.cells[2].source = 'print("changed")'
    nbformat.write(nb, toy.notebook('3_three'))
    assert toy.run('toy', '--set', '2_two.n=2') == 0
    third = toy.ended()
    assert [third[s] == second[s] for s in toy.steps] == [True, True, False]

    time.sleep(1.1)
    (toy.outputs/'toy/1_one/out.json').unlink()         # a result that is gone is not done
    assert toy.run('toy', '--only', '1') == 0
    assert toy.ended()['1_one'] != third['1_one']


def test_data_base_and_library_belong_to_the_key(toy, monkeypatch):
    import llava_med.lab.runner as b
    (toy.root/'mine').mkdir()
    (toy.root/'mine/a.xml').write_text('one')
    values = plan_run(read_preset('toy'), 'toy', sets=['1_one.files=[mine]'])['1_one']
    key = lambda: b.step_key(b.step_inputs('1_one', values, read_run('toy')))
    keys = [key()]
    assert key() == keys[0]
    (toy.root/'mine/a.xml').write_text('two'); keys.append(key())
    (toy.root/'data/base_tiny').mkdir(parents=True)
    (toy.root/'data/base_tiny/config.json').write_text('{}'); keys.append(key())
    (toy.root/'data/base_tiny/config.json').write_text('{"a": 1}'); keys.append(key())
    monkeypatch.setattr(b, 'library_fingerprint', lambda nb: 'another'); keys.append(key())
    assert len(set(keys)) == len(keys)


def test_keeping_needs_no_torch(toy):
    assert toy.run('toy', '--only', '1') == 0
    code = (SAME + "assert c.main(['run', 'toy', '--only', '1']) == 0\n"
            "assert not {'torch', 'transformers', 'papermill'} & set(sys.modules)")
    env = {**os.environ, 'PYTHONPATH': str(REPO)}
    done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '1_one: unchanged, kept' in done.stdout


# One process at a time, and none that outlives its parent

def test_two_processes_one_run(toy, capsys):
    kernel = sleeper(toy)
    p = start('toy')
    try:
        wait_for(kernel.exists)
        folder = toy.outputs/'toy/2_two'
        assert list(folder.glob('*.partial-*')) and not (folder/'2_two.ipynb').exists()
        assert toy.record()['2_two']['state'] == 'running'
        assert toy.run('toy') == 1
        err = capsys.readouterr().err
        assert "The run 'toy' is in use by process" in err and str(p.pid) in err and len(err.strip().splitlines()) == 1
        with pytest.raises(RunLocked): Step('2_two', 'toy', device='cpu')      # by hand neither
        members = family(p.pid)
        assert len(members) >= 3                                              # runner, papermill, kernel
        p.kill(); p.wait()
        wait_for(lambda: not any(m.is_running() and m.status() != 'zombie' for m in members), 20)
    finally: p.kill()
    toy.step('2_two')
    assert toy.run('toy', '--only', '1', '2') == 0, 'a dead owner locks nothing'
    assert not list((toy.outputs/'toy').rglob('*.partial-*'))


@pytest.mark.parametrize('sign', [signal.SIGINT, signal.SIGTERM])
def test_interrupted(toy, sign):
    kernel = sleeper(toy)
    p = start('toy', '--only', '1', '2')
    wait_for(kernel.exists)
    members = family(p.pid)
    os.killpg(p.pid, sign)
    out, err = p.communicate(timeout=30)
    assert p.returncode == 130 and 'Interrupted' in err and 'Traceback' not in err
    wait_for(lambda: not any(m.is_running() and m.status() != 'zombie' for m in members), 20)
    assert toy.record()['2_two']['state'] == 'interrupted' and not (toy.outputs/'toy/2_two/2_two.ipynb').exists()
    first = toy.ended()['1_one']
    toy.step('2_two')
    assert toy.run('toy', '--only', '1', '2') == 0 and toy.ended()['1_one'] == first


def test_another_preset_under_a_name_is_refused(toy, capsys):
    assert toy.run('toy', '--only', '1') == 0
    toy.preset('other', 'description: Another.\n')
    assert toy.run('other', '--name', 'toy') == 1
    assert "was made by the preset 'toy', not by 'other'" in capsys.readouterr().err
    mine = toy.root/'toy.yaml'                       # a file elsewhere with the same name is another preset
    mine.write_text('description: Mine.\n')
    assert toy.run(str(mine)) == 1
    assert toy.run('other', '--only', '1') == 0


# Disks

def test_unwritable_outputs(toy, capsys, monkeypatch):
    blocked = toy.root/'a file'
    blocked.write_text('')
    monkeypatch.setenv('LLAVA_MED_OUTPUTS', str(blocked/'outputs'))
    assert toy.run('toy') == 1
    err = capsys.readouterr().err
    assert 'Cannot' in err and 'LLAVA_MED_OUTPUTS' in err and len(err.strip().splitlines()) == 1


def test_lock_that_cannot_be_written(toy, capsys, monkeypatch):
    def refuse(*a, **k): raise PermissionError(13, 'Permission denied', str(toy.outputs/'toy/.lock'))
    monkeypatch.setattr('llava_med.core.runs.filelock.FileLock.acquire', refuse)
    assert toy.run('toy') == 1
    err = capsys.readouterr().err
    assert 'LLAVA_MED_OUTPUTS' in err and len(err.strip().splitlines()) == 1


def test_full_disk(toy, capsys, monkeypatch):
    disk = toy.root/'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=300k', 'none', str(disk)], capture_output=True).returncode:
        pytest.skip('a small disk cannot be mounted here')
    try:
        monkeypatch.setenv('LLAVA_MED_OUTPUTS', str(disk))
        toy.step('2_two', "write_json(run_dir(run)/'2_two'/'big.json', 'x'*10**6)")
        assert toy.run('toy') == 1
        err = capsys.readouterr().err
        assert 'Cannot write' in err and 'free some space' in err and len(err.strip().splitlines()) == 1
        assert not (disk/'toy/2_two/big.json').exists() and not (disk/'toy/2_two/2_two.ipynb').exists()
        assert not list((disk/'toy/2_two').glob('.*.tmp'))
    finally: subprocess.run(['umount', str(disk)])


# Step and runner in one folder

STEP = ("from llava_med.core.runs import Step\nstep = Step('1_one', run, inputs_from, seed, 'cpu')\n"
        "import json\nfiles_seen = sorted(p.name for p in step.dir.iterdir() if p.name[0] != '.')\n"
        "json.dump(files_seen, open(step.path('seen.json'), 'w'))\nstep.finish(score=0.5)")


def test_step_clears_its_folder_but_not_the_running_notebook(toy):
    make_notebook(toy.notebook('1_one'), PARAMETERS, STEP)
    (toy.outputs/'toy/1_one/model').mkdir(parents=True)
    (toy.outputs/'toy/1_one/model/old.bin').write_text('old')
    (toy.outputs/'toy/1_one/old.csv').write_text('old')
    assert toy.run('toy', '--only', '1') == 0
    seen = json.loads((toy.outputs/'toy/1_one/seen.json').read_text())
    assert len(seen) == 1 and '.partial-' in seen[0]
    record = toy.record()['1_one']
    assert record['state'] == 'done' and record['results'] == {'score': 0.5} and record['key']
    ledger = json.loads((toy.outputs/'toy/1_one/ledger.json').read_text())
    assert ledger['wall_s'] > 0 and ledger['peak_memory_mib'] > 10


def test_a_copy_that_is_run_by_hand_has_its_own_folder(toy, monkeypatch, capsys):
    Step('2_two', 'scratch', device='cpu').path('kept.txt').write_text('of the original')
    toy.notebook('2_two-Copy1').write_text(toy.notebook('2_two').read_text())
    for book, name in (('2_two-Copy1', '2_two-Copy1'), ('Copy of 2_two', 'Copy-of-2_two'), ('2_two', '2_two'), ('other', '2_two')):
        monkeypatch.setenv('JPY_SESSION_NAME', str(toy.notebook(book)))
        if name == '2_two': assert (toy.outputs/'scratch/2_two/kept.txt').exists(), 'no copy has touched it'
        step = Step('2_two', 'scratch', device='cpu')
        assert step.dir == toy.outputs/'scratch'/name and ('is a copy of 2_two.ipynb' in capsys.readouterr().out) == (name != '2_two')
        step.lock.release()
        if name == '2_two': step.path('kept.txt').write_text('of the original')


def test_only_the_shipped_base_is_restored_with_git(toy):
    step = Step('2_two', 'scratch', device='cpu')
    with pytest.raises(StepInputError, match='my_base is missing') as e: step.uses('base_model', toy.root/'my_base')
    assert 'git checkout' not in str(e.value)
    with pytest.raises(StepInputError, match='git checkout data/base_tiny'): step.uses('base_model', toy.root/'data/base_tiny')


def test_a_step_by_hand_makes_the_runner_run_it_again(toy):
    assert toy.run('toy', '--only', '1') == 0
    before = toy.record()['1_one']['key']
    Step('1_one', 'toy', device='cpu').finish()
    assert toy.record()['1_one']['state'] == 'done' and toy.record()['1_one']['key'] is None
    assert toy.run('toy', '--only', '1') == 0
    assert toy.record()['1_one']['key'] == before and (toy.outputs/'toy/1_one/out.json').exists()


def test_missing_input_names_the_command(toy):
    step = Step('2_two', 'mine', 'tiny', device='cpu')
    with pytest.raises(StepInputError, match=r'`llava-med run tiny --only 1_one`'): step.input('1_one', 'out.json')
    (run_dir('mine')/'1_one').mkdir(parents=True)
    (run_dir('mine')/'1_one/out.json').write_text('{}')
    assert step.input('1_one', 'out.json').read_text() == '{}'
    update_run('long', preset='toy')
    other = Step('2_two', 'mine', 'long', device='cpu')
    with pytest.raises(StepInputError, match=r'`llava-med run toy --name long --only 0_zero`'): other.input('0_zero', 'x')


# Outputs back into the book

def test_refresh_brings_outputs_only(toy):
    toy.step('1_one', "print('seen', run_dir(run))\nprint('warn', file=sys.stderr)\n"
             "from IPython.display import display\ndisplay({'application/vnd.jupyter.widget-view+json': {}}, raw=True)")
    (toy.outputs/'toy/1_one').mkdir(parents=True)
    from llava_med.lab.steps import UsageError
    again = ['toy', '--only', '1']
    assert toy.run(*again, '--set', '1_one.n=9') == 0
    with pytest.raises(UsageError, match='another n than its notebook shows'): refresh('toy')
    assert toy.run(*again) == 0
    update_run('toy', '1_one', state='running')
    with pytest.raises(UsageError, match='is running, not done'): refresh('toy')
    update_run('toy', '1_one', state='done')
    assert refresh('toy') == ['1_one']
    assert main(['refresh', 'toy']) == 0
    nb = nbformat.read(toy.notebook('1_one'), 4)
    assert [c.id for c in nb.cells] == ['cell0', 'cell1', 'cell2', 'cell3']
    assert nb.cells[0].metadata.tags == ['parameters'] and nb.cells[0].source == PARAMETERS
    assert 'widgets' not in nb.metadata and 'papermill' not in nb.metadata
    text = json.dumps([c.outputs for c in nb.cells])
    assert str(toy.root) not in text and 'widget-view' not in text and 'warn' not in text
    assert 'seen outputs/toy' in text
    assert all(c.execution_count is None for c in nb.cells)
    example = json.loads((toy.root/'outputs/example/run.json').read_text())
    assert 'host' not in example['machine'] and str(toy.root) not in json.dumps(example)
    example['steps'] |= {'2_other': {'state': 'done'}, '3_gone': {'state': 'done'}}   # of another run; of a step that is no longer there
    (toy.root/'outputs/example/2_other').mkdir()
    (toy.root/'outputs/example/run.json').write_text(json.dumps(example))
    refresh('toy')
    assert set(json.loads((toy.root/'outputs/example/run.json').read_text())['steps']) == {'1_one', '2_other'}
    first = toy.ended()
    assert toy.run(*again) == 0 and toy.ended() == first, 'refreshing is no reason to run again'
    nb.cells[2].source = 'print("newer")'
    nbformat.write(nb, toy.notebook('1_one'))
    with pytest.raises(UsageError, match='has changed since it was run'): refresh('toy')
    assert main(['refresh', 'toy']) == 2 and main(['refresh', 'none']) == 1 and main(['readme']) == 1


def test_the_terminal_shows_how_far_it_is(toy, capsys):
    toy.step('1_one', "print('a table')\nfrom llava_med.core.runs import progress\nfor x in progress(range(3), 'drawing'): pass")
    assert toy.run('toy', '--only', '1') == 0
    out = capsys.readouterr().out
    assert 'drawing: 3 of 3 items (100%)' in out and 'a table' not in out
    assert toy.run('toy', '--only', '1', '--name', 'loud', '-v') == 0
    assert 'a table' in capsys.readouterr().out


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as e: main(['run', '--help'])
    text = capsys.readouterr().out
    assert e.value.code == 0 and 'llava-med run tiny --only 4_evaluation' in text and 'exit code' in text


@pytest.mark.parametrize('deaths,ok', [(1, True), (3, False)])
@pytest.mark.parametrize('words', ['Kernel died before replying to kernel_info', "Kernel didn't respond in 60 seconds"])
def test_a_kernel_that_dies_before_it_replies_is_started_again(tmp_path, deaths, ok, words):
    "Nothing has run by then; after the third time the notebook fails with what was said."
    code = ("import papermill; calls = []\n"
            "def fake(*args, **more):\n"
            "    calls.append(1)\n"
            f"    if len(calls) <= {deaths}: raise RuntimeError({words!r})\n"
            "papermill.execute_notebook = fake\n"
            "from llava_med.lab.runner import child; child()")
    job = json.dumps(dict(notebook=str(tmp_path/'a.ipynb'), partial=str(tmp_path/'b.ipynb'), parameters={}))
    p = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    p.stdin.write(job + '\n'); p.stdin.flush()   # and left open: a child ends when its input does
    outcome = json.loads(p.stdout.read().split(OUTCOME_MARK)[-1])
    p.communicate()
    assert outcome['ok'] is ok and (ok or words in outcome['error'])
