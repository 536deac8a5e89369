"Every way to install takes the same versions: the lock, the wheelhouse, containers and hosted notebooks."
import hashlib
import json
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPO = Path(__file__).resolve().parents[1]
read = lambda name: (REPO/name).read_text(encoding='utf-8')
BUILDERS = {'build', 'wheel', 'pyproject-hooks'}   # they come along where something is built
PYTHONS = ('3.11', '3.12', '3.13')


def settings():
    c = ConfigParser(delimiters=['='])
    c.read(REPO/'settings.ini', encoding='utf-8')
    return c['DEFAULT']


def pins(text):
    "Name → requirement, of a list of pins; comments are passed over."
    rows = [x.split('#')[0].strip() for x in text.splitlines()]
    return {canonicalize_name(r.name): r for r in map(Requirement, filter(None, rows))}


version = lambda r: str(r.specifier).removeprefix('==')


def drifted(lock, constraints):
    "Where a lock says something else than the constraints that it is made of."
    found = []
    for name, r in lock.items():
        if not str(r.specifier).startswith('=='): found.append(f'{r} is no pin')
        elif name in constraints:
            if version(r) != version(constraints[name]): found.append(f'{r} is not {constraints[name]}')
        elif name not in BUILDERS and not r.marker: found.append(f'{name} is in no constraint, and is for all')
    return found + [f'{n} is not in the lock' for n in constraints if n not in lock]


LOCK, CONSTRAINTS = pins(read('install/lock.txt')), pins(read('constraints.txt'))


# The lock

def test_the_lock_agrees_with_the_constraints():
    assert len(LOCK) >= len(CONSTRAINTS) > 200 and not drifted(LOCK, CONSTRAINTS), 'bash install/lock.sh'


def test_the_lock_allows_every_requirement():
    c = settings()
    rows = [x.strip() for k in ('requirements', 'dev_requirements') for x in c[k].splitlines() if x.strip()]
    for r in map(Requirement, rows):
        pin = LOCK[canonicalize_name(r.name)]
        assert pin.marker is None and r.specifier.contains(version(pin), prereleases=True), (r, pin)


@pytest.mark.parametrize('system', ['linux', 'darwin', 'win32'])
@pytest.mark.parametrize('python', PYTHONS)
def test_every_platform_finds_what_it_needs(python, system):
    "Markers are read for the machine that is asked for, not for this one."
    there = dict(python_version=python, python_full_version=f'{python}.9', sys_platform=system,
                 os_name='nt' if system == 'win32' else 'posix', implementation_name='cpython',
                 platform_machine={'win32': 'AMD64', 'darwin': 'arm64'}.get(system, 'x86_64'))
    found = {n for n, r in LOCK.items() if r.marker is None or r.marker.evaluate(there)}
    assert {'torch', 'transformers', 'jupyterlab', 'nbdev', 'hf-xet'} <= found and len(found) > 200
    assert ('pywinpty' in found) == (system == 'win32') and ('appnope' in found) == (system == 'darwin')
    assert ('triton' in found) == (system == 'linux'), 'the CUDA build of torch is for Linux'


def test_the_lock_says_how_it_is_made():
    assert 'bash install/lock.sh' in read('install/lock.txt').splitlines()[1]
    script = read('install/lock.sh')
    for word in ('setup.py', '--extra dev', '-c constraints.txt', '--universal', '-o install/lock.txt'):
        assert word in script, word


def test_drift_is_found():
    lock = pins('a==1\nb==2 ; sys_platform == "win32"\nc==3\nd>=1\n# e==1\n')
    found = ' '.join(drifted(lock, pins('a==2\nf==1\nd==1')))
    for word in ('a==1 is not a==2', 'c is in no constraint', 'd>=1 is no pin', 'f is not in the lock'):
        assert word in found
    assert 'b is' not in found


# Containers and hosted notebooks

INSTALL = re.compile(r"-c install/lock\.txt .*torch==([\d.]*\d) .*\.\[dev\]")


def test_conda_binder_and_colab_install_from_the_lock():
    conda = yaml.safe_load(read('environment.yml'))['dependencies'][-1]['pip']
    colab = ' '.join(c.source for c in nbformat.read(REPO/'install/colab.ipynb', 4).cells)
    for text in (' '.join(conda), read('binder/postBuild').replace('\\\n', ''), colab):
        assert INSTALL.search(text)[1] == version(CONSTRAINTS['torch']), text
    [python] = [d for d in yaml.safe_load(read('binder/environment.yml'))['dependencies'] if 'python' in d]
    assert python == f"python={settings()['min_python']}"
    assert read('binder/postBuild').startswith('#!') and (REPO/'binder/postBuild').stat().st_mode & 0o100


def test_the_container_uses_make_and_the_lock():
    d = json.loads(read('.devcontainer/devcontainer.json'))
    made = re.fullmatch(r"make (\S+) PIP_FLAGS='(.+)'", d['postCreateCommand'])
    assert f'\nREADY := {made[1]}\n' in read('Makefile') and '-c install/lock.txt' in made[2]
    assert re.search(r'python:3\.1[1-9]', d['image'])


def test_the_colab_page_is_clean():
    nb = nbformat.read(REPO/'install/colab.ipynb', 4)
    assert not any(c.get('outputs') or c.get('execution_count') for c in nb.cells)


# The workflow

def workflow(): return yaml.safe_load(read('.github/workflows/test.yml'))


def said(job): return [s['run'] for s in job['steps'] if 'run' in s]


def test_jobs_are_separate_and_run_what_make_has():
    d = workflow()
    targets = set(re.findall(r'(?m)^([a-z-]+):', read('Makefile')))
    wanted = dict(chapters='test-chapters', quick='test-quick', slow='test-slow', book='docs')
    for job, target in wanted.items():
        assert said(d['jobs'][job]) == [f'make {target}'] and target in targets
    for job in ('chapters', 'quick'): assert d['jobs'][job]['strategy']['matrix']['python'] == list(PYTHONS)
    smoke = d['jobs']['smoke']['strategy']['matrix']
    assert {x.split('-')[0] for x in smoke['os']} == {'ubuntu', 'macos', 'windows'}
    assert set(smoke['python']) == {PYTHONS[0], PYTHONS[-1]}


def test_the_jobs_are_together_what_the_server_runs():
    made = read('Makefile')
    recipe = lambda t: re.search(rf'(?m)^{t}: .*\n((?:\t.*\n)+)', made)[1]
    for part in ('nbdev_test --n_workers 2', "pytest tests -q -m 'not slow' -n 2 --dist loadfile"):
        assert part in recipe('test') and sum(part in recipe(t) for t in ('test-chapters', 'test-quick')) == 1
    assert 'make test' in read('.ci/run') and 'test-slow' in read('.ci/run')


def test_what_a_workflow_names_is_there():
    d = workflow()
    text = '\n'.join(r for j in d['jobs'].values() for r in said(j))
    for f in re.findall(r'(?:tests|install)/[\w.]+\w', text): assert (REPO/f).exists(), f
    for j in d['jobs'].values(): assert j['timeout-minutes'] and str(j['runs-on'])
    assert f"torch=={version(CONSTRAINTS['torch'])}" in text and '-c install/lock.txt' in d['env']['PIP_FLAGS']
    assert d['permissions'] == {'contents': 'read'}


def test_what_was_not_tried_is_said():
    comments = ' '.join(x.lstrip('# ') for x in read('.github/workflows/test.yml').splitlines() if x.startswith('#'))
    for word in ('Not tried', '3.12', 'macOS', 'Windows', 'never run'): assert word in comments
    assert 'never been run on Colab' in read('install/colab.ipynb')


# The wheelhouse

def toy(folder, **change):
    "A wheelhouse of two files and their sums."
    folder.mkdir()
    files = {'a-1-py3-none-any.whl': b'one', 'lock.txt': b'a==1\n'}
    sums = [f'{hashlib.sha256(data).hexdigest()}  {n}' for n, data in files.items()]
    (folder/'SHA256SUMS').write_text('\n'.join(sums) + '\n')
    for n, data in (files | change).items():
        if data is not None: (folder/n).write_bytes(data)
    return folder


def offline(*words):
    return subprocess.run(['bash', str(REPO/'install/offline.sh'), *map(str, words)], capture_output=True, text=True)


@pytest.mark.skipif(sys.platform == 'win32', reason='a script for bash')
@pytest.mark.parametrize('change, named', [({'a-1-py3-none-any.whl': b'two'}, 'a-1-py3'), ({'lock.txt': None}, 'lock.txt'),
                                           ({'b.whl': b''}, 'b.whl')])
def test_a_changed_wheelhouse_is_refused_before_anything_is_installed(change, named, tmp_path):
    done = offline(toy(tmp_path/'wheels', **change), tmp_path/'env')
    assert done.returncode == 1 and named in done.stderr and not (tmp_path/'env').exists()


@pytest.mark.skipif(sys.platform == 'win32', reason='a script for bash')
def test_a_folder_that_is_no_wheelhouse_is_refused(tmp_path):
    assert offline(tmp_path).returncode == 2 and offline().returncode == 2
    done = subprocess.run(['bash', str(REPO/'install/wheelhouse.sh')], capture_output=True, text=True)
    assert done.returncode == 2 and 'usage' in done.stderr


def test_the_index_is_switched_off():
    text = read('install/offline.sh')
    assert 'PIP_NO_INDEX=1' in text and INSTALL.search(text)[1] == version(CONSTRAINTS['torch'])
    assert f"torch=={version(CONSTRAINTS['torch'])}" in read('install/wheelhouse.sh')


# Pages

@pytest.mark.parametrize('page', ['install/README.md', 'install/offline.md', 'SECURITY.md'])
def test_links_and_files_of_the_pages(page):
    text = read(page)
    for link in re.findall(r'\]\(([^)#:]+)\)', text): assert ((REPO/page).parent/link).exists(), link
    for f in re.findall(r'(?:install|binder|\.devcontainer)/[\w.]+\w', text): assert (REPO/f).exists(), f


def test_the_lock_is_made_for_the_oldest_python_that_the_library_takes():
    full = re.search(r'--python-version (\S+)', read('install/lock.sh'))[1]
    assert Version(full) == Version(settings()['min_python']) and settings()['min_python'] in read('install/README.md')
