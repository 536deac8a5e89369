"The places that name requirements cannot drift apart, and what people read about the project agrees with it."
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


def settings(path=REPO/'settings.ini'):
    "settings.ini, as setup.py reads it."
    c = ConfigParser(delimiters=['='])
    c.read(path, encoding='utf-8')
    return c['DEFAULT']


def lines(c, key): return [x.strip() for x in c.get(key, '').splitlines() if x.strip()]


def pins(text):
    "Package → version, of a list of pins, and sentences about what is wrong with the list."
    rows, found, wrong = [x for x in text.splitlines() if x.strip() and not x.startswith('#')], {}, []
    for r in rows:
        m = re.fullmatch(r'([A-Za-z0-9][\w.-]*)==(\S+)', r)
        if not m: wrong.append(f'{r!r} is no pin'); continue
        if (name := canonicalize_name(m[1])) in found: wrong.append(f'{m[1]} is pinned twice')
        found[name] = Version(m[2])
    if rows != sorted(rows, key=str.lower): wrong.append(f'not in alphabetical order: {next(a for a, b in zip(rows, sorted(rows, key=str.lower)) if a != b)}')
    return found, wrong


def unpinned(requirements, pinned):
    "Requirements without a pin, or whose pin they refuse."
    found = []
    for r in map(Requirement, requirements):
        name = canonicalize_name(r.name)
        if name not in pinned: found.append(f'{r} has no pin')
        elif not r.specifier.contains(pinned[name], prereleases=True): found.append(f'{r} refuses {pinned[name]}')
    return found


def conda_faults(environment, c, pinned):
    "Where environment.yml says something else than settings.ini and the pins."
    deps = environment['dependencies']
    pip = next((d['pip'] for d in deps if isinstance(d, dict)), [])
    taken = '-c install/lock.txt' in pip and '-e .[dev]' in pip
    found = [] if taken else ['environment.yml does not install -e .[dev] under -c install/lock.txt']
    if f"python={c['min_python']}" not in deps: found.append(f"environment.yml has another Python than {c['min_python']}")
    if extra := [d for d in deps if isinstance(d, str) and not re.match(r'python=|pip$', d)]: found.append(f'environment.yml takes {extra} from conda')
    named = [p for p in pip if not p.startswith('-')]
    return found + [f'environment.yml: {x}' for x in unpinned(named, pinned)] + [f'environment.yml: {n} is not pinned exactly' for n in named if '==' not in n]


def told_by_setup(folder):
    "What setup.py would tell pip: requirements and those of [dev]."
    code = ("import json, setuptools; setuptools.setup = lambda **k: print('@' + json.dumps([k['install_requires'], k['extras_require']['dev'], "
            "k['python_requires'], k['version'], k['entry_points']['console_scripts']])); exec(open('setup.py').read())")
    said = subprocess.run([sys.executable, '-c', code], cwd=folder, capture_output=True, text=True, check=True).stdout
    return yaml.safe_load(said.split('@', 1)[1])


def test_pins_are_unique_and_sorted(): assert not pins((REPO/'constraints.txt').read_text())[1]


def test_every_requirement_has_a_pin_that_it_allows():
    c, (pinned, _) = settings(), pins((REPO/'constraints.txt').read_text())
    wanted = lines(c, 'requirements') + lines(c, 'dev_requirements')
    assert not unpinned(wanted, pinned)
    names = [canonicalize_name(Requirement(r).name) for r in wanted]
    assert len(set(names)) == len(names), 'a package is required twice'


def test_environment_is_built_from_the_same_files():
    assert not conda_faults(yaml.safe_load((REPO/'environment.yml').read_text()), settings(), pins((REPO/'constraints.txt').read_text())[0])


def test_setup_says_what_the_settings_say():
    c = settings()
    assert told_by_setup(REPO) == [lines(c, 'requirements'), lines(c, 'dev_requirements'), f">={c['min_python']}", c['version'], lines(c, 'console_scripts')]


def test_make_conda_and_readme_install_the_same_torch():
    pinned = pins((REPO/'constraints.txt').read_text())[0]['torch']
    for f in ('Makefile', 'environment.yml', 'README.md', 'nbs/pages/install.ipynb'):
        named = set(re.findall(r'torch==([\d.]+\d)', (REPO/f).read_text()))
        assert named == {str(pinned)}, f'{f} names torch {named}'
    assert settings()['min_python'] in (REPO/'Makefile').read_text() and f"Python {settings()['min_python']} or newer" in (REPO/'README.md').read_text()


def test_the_pins_hold_one_another():
    "What a pinned package requires here is itself pinned, at a version that it allows; packages that are not installed are passed over."
    from importlib.metadata import PackageNotFoundError, requires
    pinned, wrong = pins((REPO/'constraints.txt').read_text())[0], []
    for name in pinned:
        try: needed = [Requirement(r) for r in requires(name) or []]
        except PackageNotFoundError: continue
        for r in needed:
            other = canonicalize_name(r.name)
            if (r.marker is None or r.marker.evaluate({'extra': ''})) and other in pinned and not r.specifier.contains(pinned[other], prereleases=True):
                wrong.append(f'{name} asks for {r}, pinned is {pinned[other]}')
    assert not wrong


def test_the_lock_can_fail(tmp_path):
    assert pins('a==1\nb==2\n# c\n') == ({'a': Version('1'), 'b': Version('2')}, [])
    wrong = ' '.join(pins('b==1\nA==1\na==2\nc>=3\n')[1])
    for w in ('no pin', 'pinned twice', 'alphabetical'): assert w in wrong
    assert unpinned(['a>=2', 'Under_Score<3', 'gone'], {'a': Version('1'), 'under-score': Version('2.9')}) == ['a>=2 refuses 1', 'gone has no pin']
    bad = {'dependencies': ['python=3.9', 'numpy', {'pip': ['-e .', 'torch>=2', 'x==1']}]}
    found = ' '.join(conda_faults(bad, {'min_python': '3.11'}, {'torch': Version('2.1')}))
    for w in ('install/lock.txt', 'Python than 3.11', 'numpy', 'x==1 has no pin', 'not pinned exactly'): assert w in found
    for f in ('setup.py', 'README.md'): (tmp_path/f).write_text((REPO/f).read_text())
    (tmp_path/'settings.ini').write_text((REPO/'settings.ini').read_text().replace('numpy>=2.0', 'numpy>=2.1'))
    assert told_by_setup(tmp_path)[0] != lines(settings(), 'requirements')


# What people read

CFF = {'abstract', 'authors', 'cff-version', 'commit', 'contact', 'date-released', 'doi', 'identifiers', 'keywords', 'license', 'license-url', 'message',
       'preferred-citation', 'references', 'repository', 'repository-artifact', 'repository-code', 'title', 'type', 'url', 'version'}


def test_the_citation_file():
    "The schema's own rules: known keys, those that must be there, names of persons or of one entity."
    d, c = yaml.safe_load((REPO/'CITATION.cff').read_text()), settings()
    assert not set(d) - CFF and d['cff-version'] == '1.2.0' and {'message', 'title', 'authors'} <= set(d) and d['type'] in ('software', 'dataset')
    assert (str(d['version']), d['title'], d['license']) == (c['version'], c['title'], 'Apache-2.0')
    assert [a.get('name') for a in d['authors']] == [c['author']] and len(set(d['keywords'])) == len(d['keywords'])
    for r in d.get('references', []):
        assert {'type', 'title', 'authors'} <= set(r) and all({'family-names'} <= set(a) or 'name' in a for a in r['authors'])


def test_the_changelog_knows_the_version():
    assert re.search(r'(?m)^## (\S+?),? ', (REPO/'CHANGELOG.md').read_text())[1] == settings()['version']


@pytest.mark.parametrize('path', sorted((REPO/'.github/ISSUE_TEMPLATE').glob('[0-9]*.yml')), ids=lambda p: p.stem)
def test_forms(path):
    d = yaml.safe_load(path.read_text())
    assert {'name', 'description', 'body'} <= set(d) <= {'name', 'description', 'body', 'labels', 'title', 'assignees', 'projects', 'type'}
    for b in d['body']:
        assert b['type'] in ('markdown', 'input', 'textarea', 'dropdown', 'checkboxes') and not set(b) - {'type', 'id', 'attributes', 'validations'}
        assert not set(b['attributes']) - {'label', 'description', 'placeholder', 'value', 'render', 'options', 'multiple'}
        assert ('value' if b['type'] == 'markdown' else 'label') in b['attributes']


def test_the_workflow_runs_targets_that_make_has():
    d = yaml.safe_load((REPO/'.github/workflows/test.yml').read_text())
    steps = [s for j in d['jobs'].values() for s in j['steps']]
    targets = set(re.findall(r'(?m)^([a-z-]+):', (REPO/'Makefile').read_text()))
    said = [*(s.get('run', '') for s in steps), (REPO/'.ci/run').read_text()]
    found = {t for s in said for t in re.findall(r'(?m)^\s*make (?:-s )?([a-z-]+)', s)}
    assert found <= targets and {'test', 'test-slow', 'test-chapters', 'test-quick'} <= found
    python = [str(s['with']['python-version']) for s in steps if 'setup-python' in s.get('uses', '')]
    assert settings()['min_python'] in python


def test_contributing_names_what_is_there():
    text = (REPO/'CONTRIBUTING.md').read_text()
    targets = set(re.findall(r'(?m)^([a-z-]+):', (REPO/'Makefile').read_text()))
    assert set(re.findall(r'make ([a-z-]+)', ' '.join(re.findall(r'`([^`\n]+)`', text)) + ' '.join(re.findall(r'(?m)^ +(make [a-z-]+)$', text)))) <= targets
    for f in set(re.findall(r'(?:nbs|tests|\.ci)/\w[\w./]*\w', text)) - {'nbs/NN_package/NN_noun.ipynb', 'nbs/pipeline'}: assert (REPO/f).exists(), f
    chapter = nbformat.read(REPO/'nbs/00_core/02_runs.ipynb', 4)
    assert any(c.source.startswith('#| export') for c in chapter.cells)


def test_the_readme_leads_on():
    text = (REPO/'README.md').read_text()
    for f in ('CONTRIBUTING.md', 'CHANGELOG.md', 'make docs', 'git clone --depth 1'): assert f in text, f
