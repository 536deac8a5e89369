"Recipes and what they share: their chapters and studies run from top to bottom, and the template becomes one of them."
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from llava_med.core.registry import UnknownName
from llava_med.recipes.parts import FIRST_SCENE, study_world
from llava_med.recipes.rewards import REWARDS, reward_of
from llava_med.recipes.study import RECIPE_FILES, STUDY_COLUMNS, new_recipe, read_study_file

REPO = Path(__file__).resolve().parents[1]
TEMPLATE = REPO/'nbs/recipes/_template'
CHAPTERS = sorted(p for p in (REPO/'nbs/recipes').rglob('*.ipynb') if not any(x.startswith(('_', '.')) for x in p.relative_to(REPO/'nbs').parts))
RUN = "import sys; from pathlib import Path; from nbdev.test import test_nb; sys.exit(not test_nb(Path(sys.argv[1]), basepath=Path(sys.argv[2]))[0])"


def python(root, *words):
    "Run Python in a copy of the repository, one thread a process: two tests run at a time."
    env = {**os.environ, 'LLAVA_MED_ROOT': str(root), 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)
def test_the_chapter_runs(path): python(REPO, '-c', RUN, path, REPO)


def test_there_are_recipes(): assert len(CHAPTERS) >= 4


# The template

def test_nbdev_leaves_the_template_out():
    from nbdev.config import get_config
    from nbdev.doclinks import nbglob
    found = nbglob(get_config(cfg_name='settings.ini', path=REPO).nbs_path)
    assert found and not [p for p in found if '_template' in Path(p).parts]
    assert sorted(p.name for p in TEMPLATE.iterdir() if not p.name.startswith('.')) == sorted(RECIPE_FILES)


def test_the_template_is_read_with_outputs_and_copied_without(tmp_path):
    shutil.copytree(TEMPLATE, tmp_path/'_template')
    copies = [p for p in new_recipe('losses', 'rare_answers', tmp_path) if p.suffix == '.ipynb']
    for paths, there in ((TEMPLATE.glob('*.ipynb'), True), (copies, False)):
        for path in paths:
            cells = json.loads(path.read_text())['cells']
            run = [c for c in cells if c.get('outputs') or c.get('execution_count') or 'execution' in c['metadata']]
            assert bool(run) == there, path
            assert len({c['id'] for c in cells}) == len(cells)


def test_the_study_file_of_the_template():
    said = []
    for size in ('full', 'smoke'): study = read_study_file(TEMPLATE/'study.yaml', size, say=said.append)
    assert not said and {a['role'] for a in study.arms.values()} == {'base', 'idea', 'placebo', 'positive_control'}


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "The repository with a new recipe, made and exported as the page says."
    root = tmp_path_factory.mktemp('copy')
    skip = shutil.ignore_patterns('.ipynb_checkpoints', '__pycache__')
    for d in ('nbs', 'llava_med'): shutil.copytree(REPO/d, root/d, ignore=skip)
    for f in ('settings.ini', 'README.md', 'pyproject.toml'): shutil.copy(REPO/f, root)
    os.symlink(REPO/'data', root/'data')
    python(root, '-c', "from llava_med.recipes.study import new_recipe; new_recipe('losses', 'rare_answers')")
    python(root, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()')
    return root


@pytest.mark.slow
def test_the_chapter_of_a_new_recipe_runs(copy):
    assert (copy/'llava_med/recipes/rare_answers.py').exists()
    python(copy, '-c', RUN, copy/'nbs/recipes/losses/rare_answers.ipynb', copy)


@pytest.mark.slow
def test_the_study_of_a_new_recipe_ends_with_a_verdict(copy, tmp_path, monkeypatch):
    monkeypatch.setenv('LLAVA_MED_OUTPUTS', str(tmp_path))
    words = ['-m', 'papermill', '-k', 'python3', copy/'nbs/recipes/losses/rare_answers_study.ipynb', tmp_path/'out.ipynb', '-p', 'run', 'mine']
    python(copy, *words)
    with open(tmp_path/'mine/rare_answers_smoke/study.csv', newline='') as f: rows = list(csv.DictReader(f))
    assert tuple(rows[0]) == STUDY_COLUMNS and [r['verdict'] for r in rows if r['row'] == 'rare_answers-base'] != ['']
    assert len((tmp_path/'mine/rare_answers_smoke/arms.jsonl').read_text().splitlines()) == 8
    first = (tmp_path/'mine/rare_answers_smoke/arms.jsonl').read_bytes()
    python(copy, *words)                                # run again, it trains nothing
    assert (tmp_path/'mine/rare_answers_smoke/arms.jsonl').read_bytes() == first
    assert '8 finished trainings are kept' in (tmp_path/'out.ipynb').read_text()


# Rewards and parts

ITEM = dict(id='q', answer='no')


def test_rewards_are_fractions_and_name_what_they_cannot_judge():
    described = dict(id='c', answer='a nodule and a mass')
    for name, item in [(n, described if n == 'findings' else ITEM) for n in REWARDS]:
        for text in ('', 'no', 'No.', 'yes', 'a nodule', 'x '*500, '<answer>no</answer>', '<answer>', '\n'): assert 0 <= reward_of(name)(text, item) <= 1
    with pytest.raises(ValueError, match="Item 'q2' has the answer 'left'"): reward_of('yes_no')('yes', dict(id='q2', answer='left'))
    with pytest.raises(ValueError, match="Item 'q2' has the answer 'left'"): reward_of('findings')('yes', dict(id='q2', answer='left'))
    with pytest.raises(UnknownName, match='a.yaml: there is no reward'): reward_of('exakt', 'a.yaml')
    for bad in ({}, {'exact': 0}, 3):
        with pytest.raises(ValueError, match='positive weights'): reward_of(bad)


def test_silence_and_lists_earn_little():
    f = reward_of('findings')
    assert f('', dict(id='n', answer='Normal brain mri.')) == 0 and f('', dict(id='c', answer='a nodule')) == 0
    everything = 'a nodule, a mass, a cyst, a tumor, a polyp, a hemorrhage, an abscess'
    assert f(everything, dict(id='c', answer='a nodule')) < .4 and reward_of('yes_no')('yes no', ITEM) == 0


def test_a_study_world_is_the_same_again_and_its_patients_are_disjoint(tmp_path):
    a, b = (study_world(3, 3, 1, tmp_path/x) for x in 'ab')
    assert (a.records, a.items, a.captions) == (b.records, b.items, b.captions)
    assert [p.read_bytes() for p in sorted(a.images.iterdir())] == [p.read_bytes() for p in sorted(b.images.iterdir())]
    patients = lambda items: {o['patient'] for o in items}
    assert not patients(a.items) & patients(a.train_items) and FIRST_SCENE > 700_000_000
    assert {r['image'] for r in a.records} | {n for o in a.items for n in o['images']} <= {p.name for p in a.images.iterdir()}
    with pytest.raises(ValueError, match='draw more'): study_world(1, 1, 0, tmp_path/'c', question_types=('none',))
