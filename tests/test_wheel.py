"The library without its repository: a wheel, unpacked elsewhere, imports whole, and its commands work or say what they need."
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
MODULES = sorted('.'.join(p.relative_to(REPO).with_suffix('').parts) for p in (REPO/'llava_med').rglob('*.py') if p.name != '__init__.py')
DATA = sorted(p.relative_to(REPO).as_posix() for p in (REPO/'llava_med').rglob('*') if p.is_file() and p.suffix not in ('.py', '.pyc'))
QUESTIONS = [dict(id=f'q{i}', images=[f'{i}.jpg'], question=f'is number {i} visible?', answer=a, answer_type='CLOSED', tags={}, split='test', options=[],
                  regions=[], twin_of=None, source='test')
             for i, a in enumerate(['yes', 'no', 'yes'])]


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "A folder that holds what the wheel holds, and no repository above it."
    source, out = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('site')
    for f in ('setup.py', 'settings.ini', 'README.md', 'pyproject.toml'): shutil.copy(REPO/f, source)
    shutil.copytree(REPO/'llava_med', source/'llava_med', ignore=shutil.ignore_patterns('__pycache__'))
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', 'dist', '.'], cwd=source, check=True, capture_output=True)
    wheel, = (source/'dist').glob('*.whl')
    zipfile.ZipFile(wheel).extractall(out)
    return out


def python(site, folder, code, *words):
    "A process that sees the unpacked wheel and no repository."
    env = {k: v for k, v in os.environ.items() if not k.startswith('LLAVA_MED')}
    return subprocess.run([sys.executable, '-c', code, *words], cwd=folder, env={**env, 'PYTHONPATH': str(site)}, capture_output=True, text=True)


def command(site, folder, *words):
    return python(site, folder, 'import sys; from llava_med.lab.commands import main; sys.exit(main())', *words)


def test_the_wheel_holds_every_module_and_data_file(site):
    there = {p.relative_to(site).as_posix() for p in (site/'llava_med').rglob('*') if p.is_file()}
    assert len(MODULES) > 60 and len(DATA) >= 7
    assert there >= {f"{m.replace('.', '/')}.py" for m in MODULES} | set(DATA)


def test_every_module_of_the_wheel_imports(site, tmp_path):
    code = 'import importlib, sys\nfor m in sys.argv[1:]: importlib.import_module(m)\nimport llava_med; print(llava_med.__file__)'
    done = python(site, tmp_path, code, *MODULES)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == str(site/'llava_med/__init__.py')


def test_scores_need_no_repository(site, tmp_path):
    (tmp_path/'test.json').write_text(json.dumps(QUESTIONS))
    (tmp_path/'answers.jsonl').write_text(''.join(json.dumps(dict(item=q['id'], prompt=q['question'], text=q['answer'])) + '\n' for q in QUESTIONS))
    done = command(site, tmp_path, 'score', 'test.json', 'answers.jsonl', '--scorer', 'strict', '--out', 'scores.csv')
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'strict' in (tmp_path/'scores.csv').read_text()


def test_data_files_are_found_without_a_repository(site, tmp_path):
    code = ('from llava_med.data.generators import read_prompts\nfrom llava_med.evaluate.judge import read_judge_prompt\n'
            'from llava_med.lab.estimate import architectures\nprint(len(read_prompts().examples), len(read_judge_prompt().system), len(architectures()))')
    done = python(site, tmp_path, code)
    assert done.returncode == 0 and all(int(n) > 0 for n in done.stdout.split()), done.stderr[-2000:]


@pytest.mark.parametrize('words', [('run', 'tiny'), ('plan', 'tiny'), ('batch', 'paper_ablations'), ('readme',), ('refresh',)], ids=lambda w: w[0])
def test_what_needs_the_repository_says_so_in_one_sentence(site, tmp_path, words):
    done = command(site, tmp_path, *words)
    assert done.returncode in (1, 2) and 'Traceback' not in done.stderr
    assert 'clone' in done.stderr and 'LLAVA_MED_ROOT' in done.stderr and 'llava-med score' in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize('words', [('convert', 'gone', 'out'), ('figures', 'gone', '--out', 'f.jsonl'), ('judge', 'gone.jsonl', 'b.jsonl', '--offline')], ids=lambda w: w[0])
def test_what_needs_no_repository_asks_for_its_files_only(site, tmp_path, words):
    done = command(site, tmp_path, *words)
    said = done.stdout + done.stderr
    assert done.returncode in (1, 2) and 'gone' in said and 'clone' not in said and 'Traceback' not in said
