"The course: its notebooks run, its checks help, its grader believes only what it can compute again."
import base64
import csv
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from llava_med.lab.exercises import BEGIN, EXERCISES, check, hint_for, points_of, unsolved
from llava_med.lab.grading import GRADE_PARTS, GRADED_STEPS, grade, made_run, nbgrader_source, otter_source, total
from llava_med.data.claims import read_claims
from llava_med.core.runs import read_json, read_jsonl, write_csv, write_json, write_jsonl
from llava_med.lab.runner import started

REPO = Path(__file__).resolve().parents[1]
COURSE = REPO/'nbs/course'
NOTEBOOKS = sorted(COURSE.rglob('*.ipynb'))
NOTEBOOKS = [p for p in NOTEBOOKS if not p.name.startswith('_') and '.ipynb_checkpoints' not in p.parts]
SESSIONS = range(1, 7)
name = lambda p: p.relative_to(COURSE).as_posix()
solutions = lambda n: COURSE/f'solutions/{n}_solutions.ipynb'


def lecture(n): return next(p for p in COURSE.glob(f'{n}_*.ipynb') if 'exercises' not in p.name)


def markdown(nb): return '\n'.join(c.source for c in nb.cells if c.cell_type == 'markdown')


@pytest.mark.slow
@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_notebook_runs(path, tmp_path):
    import papermill
    how = dict(cwd=str(path.parent), kernel_name='python3', progress_bar=False)
    started(lambda **own: papermill.execute_notebook(str(path), str(tmp_path/'out.ipynb'), **how, **own))
    out = nbformat.read(tmp_path/'out.ipynb', 4)
    text = ' '.join(o.get('text', '') for c in out.cells for o in c.get('outputs', []))
    if 'exercises' in path.name: assert '0 of 5' in text and 'three dots' in text
    if 'solutions' in path.name: assert '5 of 5' in text and 'Not yet' not in text


def test_the_course_is_complete():
    assert {f'{n}_exercises.ipynb' for n in SESSIONS} <= {p.name for p in NOTEBOOKS}
    assert all(solutions(n).exists() and lecture(n) for n in SESSIONS)
    assert {'0_syllabus.ipynb', 'assignment.ipynb', 'instructor.ipynb'} <= {p.name for p in NOTEBOOKS}
    assert all((p.parent/'.notest').exists() for p in NOTEBOOKS)
    for n in SESSIONS: assert sum(k.startswith(f'{n}.') for k in EXERCISES) == 5


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_committed_with_outputs_and_small(path):
    nb = nbformat.read(path, 4)
    assert path.stat().st_size <= 150_000
    assert any(c.get('outputs') for c in nb.cells), 'run it'
    assert re.match(r'# .+\n+> .+', nb.cells[0].source)


@pytest.mark.parametrize('n', SESSIONS)
def test_lecture_has_its_parts(n):
    nb = nbformat.read(lecture(n), 4)
    text = markdown(nb)
    assert 15 <= len(nb.cells) <= 25
    assert '## For discussion' in text and '## What you have now' in text and f'{n}_exercises.ipynb' in text
    debate = text.split('## For discussion')[1].split('##')[0]
    assert debate.count('arXiv') >= 2 and len(re.findall(r'(?m)^\*[^*]+\.\*', debate)) == 2, 'two positions, each with its source'
    assert any(k.startswith('image/') for c in nb.cells for o in c.get('outputs', []) for k in o.get('data', {})), 'a figure'


@pytest.mark.parametrize('n', SESSIONS)
def test_exercises_are_made_of_the_solutions(n):
    made, here = unsolved(nbformat.read(solutions(n), 4)), nbformat.read(COURSE/f'{n}_exercises.ipynb', 4)
    assert [c.source for c in made.cells] == [c.source for c in here.cells], 'make it again with `unsolved`'
    assert not [c for c in here.cells if BEGIN in c.source] and sum('\n    ...' in c.source for c in here.cells) == 5


@pytest.mark.parametrize('k', EXERCISES)
def test_check_knows_right_and_three_wrongs(k):
    x, heard = EXERCISES[k], []
    assert check(k, x.truth, heard.append) and heard == [f'{k}: right.']
    assert len(x.rivals) == 3 and len({h for _, h in x.rivals}) == 3
    for rival, hint in x.rivals:
        assert not check(k, rival, heard.append)
        assert heard[-1] == f'{k}: {hint}' and len(hint.split()) >= 6
    for empty in (..., None, lambda *a: ..., lambda *a: None):
        assert not check(k, empty, heard.append) and 'three dots' in heard[-1]


@pytest.mark.parametrize('n', SESSIONS)
def test_solutions_are_right(n):
    "The functions of the solutions, run apart from their notebooks' models."
    for c in nbformat.read(solutions(n), 4).cells:
        if c.cell_type != 'code' or BEGIN not in c.source: continue
        k, fn = re.search(r"check\('([\d.]+)', (\w+)\)", c.source).groups()
        space = {}
        exec('import math\nimport numpy as np\nfrom llava_med.data.claims import read_claims\nfrom llava_med.evaluate.exact import strict_normalise\n'
             + c.source.split('\nif check(')[0], space)
        assert hint_for(EXERCISES[k], space[fn]) == '', k


def heard_of(k, value):
    heard = []
    assert not check(k, value, heard.append)
    return heard[0]


@pytest.mark.parametrize('k', EXERCISES)
def test_who_prints_and_who_changes_the_input_hears_so(k, capsys):
    truth = EXERCISES[k].truth
    assert 'prints its answer' in heard_of(k, lambda *a: print(truth(*a))) and capsys.readouterr().out

    def in_place(*a):
        changed = [x for x in a if isinstance(x, list | dict | set | np.ndarray)]
        for x in changed: x.fill(-1) if isinstance(x, np.ndarray) else x.clear()
    if any(isinstance(x, list | dict | set | np.ndarray) for c in EXERCISES[k].cases for x in c):
        assert 'changes its input' in heard_of(k, in_place)
        assert check(k, truth, lambda s: None), 'the inputs of the next answer are whole'


SHARES = ['1.4', '3.2', '3.4', '4.1', '4.2', '4.3', '4.5', '5.3', '5.5', '6.1', '6.2']   # whose answers are fractions


@pytest.mark.parametrize('k', SHARES)
def test_percent_and_rounding_are_told_apart(k):
    truth = EXERCISES[k].truth
    def of(f): return lambda *a: [f(x) for x in truth(*a)] if isinstance(truth(*a), list) else f(truth(*a))
    for f in (lambda x: 100*x, lambda x: round(100*x, 1)): assert 'in percent' in heard_of(k, of(f))
    for n in (1, 2): assert check(k, of(lambda x: round(x, n)), lambda s: None) or 'cut off' in heard_of(k, of(lambda x: round(x, n)))
    assert 'is a text' in heard_of(k, lambda *a: f'{100*np.mean(truth(*a)):.1f} %')
    assert not any(w in heard_of(k, of(lambda x: x + .37)) for w in ('percent', 'cut off', 'a text'))


def test_check_never_raises():
    class Odd:
        def __eq__(self, other): raise RuntimeError('no')
        __hash__ = None
    def bad(*a): raise KeyError('x')
    heard = []
    for k in EXERCISES:
        for v in (Odd(), bad, lambda *a: Odd(), lambda: 1, 3, 'text', [], lambda *a: {'a': 1}, lambda *a: 'text', float('nan'), {}):
            assert not check(k, v, heard.append) and heard[-1].startswith(f'{k}: ')
    assert not check('9.9', 1, heard.append) and '1.1, 1.2' in heard[-1]
    assert any('KeyError' in h for h in heard)


def test_points():
    rows = points_of({k: x.truth for k, x in EXERCISES.items()})
    assert total(rows) == (30, 30) and total(points_of({}, 3)) == (0, 5)


# What a room sees of a lecture

PAGE_PX = 900     # width of a page's text, to which a wider figure is reduced
LEAST_PT = 11     # smallest text on that page, in points of 1/72 inch at 96 pixels an inch


def drawn_texts(fig):
    "Every text that a figure shows, with its box in pixels."
    from matplotlib.text import Text
    renderer, hidden = fig.canvas.get_renderer(), set()
    for ax in fig.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            for t in ticks:
                if not ax.axison or not low - 1e-9 <= t.get_loc() <= high + 1e-9: hidden |= {t.label1, t.label2}
            if not ax.axison: hidden |= {axis.label, axis.offsetText}
    texts = [t for t in fig.findobj(Text) if t.get_text().strip() and t.get_visible() and t not in hidden]
    return [(t, t.get_window_extent(renderer)) for t in texts]


def text_faults(fig, dpi):
    "What is too small on the page, cut off by the edge, or written over another text or legend."
    fig.set_dpi(dpi)
    fig.canvas.draw()
    width, texts = fig.bbox.width, drawn_texts(fig)
    found = [f'{width:.0f} pixels wide'] if width < PAGE_PX else []
    for t, b in texts:
        size = t.get_fontsize()*dpi/96*min(1, PAGE_PX/width)
        if size < LEAST_PT: found.append(f'{size:.1f} points: {t.get_text()!r}')
        if min(b.x0, b.y0, fig.bbox.x1 - b.x1, fig.bbox.y1 - b.y1) < -1: found.append(f'cut off: {t.get_text()!r}')
    for i, (t, a) in enumerate(texts):
        for u, b in texts[:i]:
            if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1:
                found.append(f'{t.get_text()!r} over {u.get_text()!r}')
    several = [ax for ax in fig.axes if sum(len(line.get_xdata()) > 1 for line in ax.lines) > 1]
    if several and not fig.legends and not all(ax.get_legend() for ax in several): found.append('no legend')
    return found


def test_the_measure_of_figures_can_fail():
    import matplotlib.pyplot as plt
    from llava_med.core.runs import figure_style
    def faults(draw, size=(8.2, 3), dpi=110):
        with figure_style():
            fig, ax = plt.subplots(figsize=size)
            draw(ax)
        found = ' '.join(text_faults(fig, dpi))
        plt.close(fig)
        return found
    assert faults(lambda ax: ax.set_title('short')) == ''
    assert 'pixels wide' in faults(lambda ax: None, (4, 3)) and 'points' in faults(lambda ax: None, dpi=60)
    assert 'points' in faults(lambda ax: ax.set_title('small', fontsize=8))
    assert 'cut off' in faults(lambda ax: ax.set_title('a long title '*12))
    def twice(ax): ax.text(.5, .5, 'one'), ax.text(.5, .5, 'two')
    assert "'two' over 'one'" in faults(twice)
    def lines(ax): ax.plot([1, 2], label='a'), ax.plot([2, 1], label='b')
    assert 'no legend' in faults(lines) and faults(lambda ax: (lines(ax), ax.legend())) == ''


def figures_of(path, monkeypatch):
    "The figures of a notebook, run in this process: each with its dots per inch and caption."
    from llava_med.core import runs
    shown = []
    monkeypatch.setattr(runs, 'show_figure', lambda fig, caption, dpi=90: shown.append((fig, dpi, caption)))
    monkeypatch.chdir(path.parent)
    space = dict(__name__='__main__', display=lambda *a, **k: None)
    for c in nbformat.read(path, 4).cells:
        if c.cell_type == 'code': exec(c.source, space)
    return shown


@pytest.mark.slow
@pytest.mark.parametrize('n', SESSIONS)
def test_the_last_row_can_read_every_figure(n, monkeypatch):
    import matplotlib.pyplot as plt
    with plt.rc_context():
        shown = figures_of(lecture(n), monkeypatch)
        faults = {caption[:50]: text_faults(fig, dpi) for fig, dpi, caption in shown}
    plt.close('all')
    assert shown and not {k: v for k, v in faults.items() if v}


@pytest.mark.parametrize('n', SESSIONS)
def test_committed_figures_are_wide_and_described(n):
    from PIL import Image
    pictures = [(k, o) for c in nbformat.read(lecture(n), 4).cells for o in c.get('outputs', []) for k in o.get('data', {}) if k.startswith('image/')]
    assert pictures
    for kind, o in pictures:
        assert Image.open(io.BytesIO(base64.b64decode(o['data'][kind]))).width >= PAGE_PX
        assert len(o['metadata'][kind]['alt'].split()) >= 8, 'say what it shows'


@pytest.mark.parametrize('n', SESSIONS)
def test_lecture_makes_slides(n):
    from nbconvert import SlidesExporter
    cells = nbformat.read(lecture(n), 4).cells
    kinds = [c.metadata.get('slideshow', {}).get('slide_type') for c in cells]
    assert set(kinds) <= {'slide', 'subslide', 'fragment', 'skip'} and kinds.count('slide') >= 6
    assert all(k == 'slide' for c, k in zip(cells, kinds) if c.source.startswith('#'))
    html, _ = SlidesExporter().from_filename(str(lecture(n)))
    assert html.count('<section') >= kinds.count('slide') + kinds.count('subslide')
    for c in cells:   # a part between two clicks up to a new slide fits a screen
        if c.cell_type == 'markdown': assert len(c.source.split()) <= 150


# Other people's graders

def tool(name):
    "A command beside this Python or on the path; without it the test is left out."
    folders = f'{Path(sys.executable).parent}{os.pathsep}{os.environ.get("PATH", "")}'
    if not shutil.which(name, path=folders): pytest.skip(f'{name} is not installed here: it is no part of the project')
    env = dict(os.environ, PATH=folders, PYTHONPATH=f'{REPO}{os.pathsep}{os.environ.get("PYTHONPATH", "")}', LLAVA_MED_ROOT=str(REPO))

    def go(*words, cwd):
        done = subprocess.run([shutil.which(name, path=folders), *map(str, words)], cwd=cwd, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    return go


def with_forged_check(nb):
    "A notebook in which somebody lets every check succeed."
    nb = nbformat.from_dict(nb)
    next(c for c in nb.cells if 'import check' in c.source).source += '\ncheck = lambda *a: True'
    return nb


@pytest.mark.slow
@pytest.mark.parametrize('n', [1, 4])
def test_nbgrader_marks_the_exercises(n, tmp_path):
    nbgrader, name = tool('nbgrader'), f'session{n}'
    (tmp_path/'nbgrader_config.py').write_text("c = get_config()\nc.CourseDirectory.course_id = 'course'\nc.ClearSolutions.code_stub = {'python': '...'}\n")
    source = tmp_path/f'source/{name}/{name}.ipynb'
    source.parent.mkdir(parents=True)
    nbformat.write(nbgrader_source(nbformat.read(solutions(n), 4)), source)
    nbgrader('generate_assignment', name, cwd=tmp_path)
    given = nbformat.read(tmp_path/f'release/{name}/{name}.ipynb', 4)
    assert BEGIN not in str(given) and sum('\n    ...' in c.source for c in given.cells) == 5
    for who, nb in dict(ada=nbformat.read(source, 4), ben=given, cy=with_forged_check(given)).items():
        (tmp_path/f'submitted/{who}/{name}').mkdir(parents=True)
        nbformat.write(nb, tmp_path/f'submitted/{who}/{name}/{name}.ipynb')
    nbgrader('autograde', name, cwd=tmp_path)
    nbgrader('export', cwd=tmp_path)
    got = {r['student_id']: (float(r['score']), float(r['max_score'])) for r in rows_of(tmp_path/'grades.csv')}
    assert got == dict(ada=(5, 5), ben=(0, 5), cy=(0, 5))


@pytest.mark.slow
@pytest.mark.parametrize('n', [1, 4])
def test_otter_marks_the_exercises(n, tmp_path):
    otter, name = tool('otter'), f'session{n}'
    nbformat.write(otter_source(nbformat.read(solutions(n), 4), name), tmp_path/f'{name}.ipynb')
    otter('assign', f'{name}.ipynb', 'dist', cwd=tmp_path)
    [key] = (tmp_path/'dist/autograder').glob('*.zip')
    given = nbformat.read(tmp_path/f'dist/student/{name}.ipynb', 4)
    assert 'BEGIN SOLUTION' not in str(given) and sum('\n    ...' in c.source for c in given.cells) == 5
    full = nbformat.read(tmp_path/f'dist/autograder/{name}.ipynb', 4)
    got = {}
    for who, nb in dict(ada=full, ben=given, cy=with_forged_check(given)).items():
        (tmp_path/who).mkdir()
        nbformat.write(nb, tmp_path/f'{who}/{name}.ipynb')
        otter('run', '-a', key, '-o', who, '--no-logo', f'{who}/{name}.ipynb', cwd=tmp_path)
        got[who] = sum(x.get('score') or 0 for x in read_json(tmp_path/who/'results.json')['tests'])
    assert got == dict(ada=5, ben=0, cy=0)


# The grader

def rows_of(path):
    with open(path, newline='') as f: return list(csv.DictReader(f))


@pytest.fixture
def run(tmp_path): return made_run(tmp_path/'run')


def verdict(run, **kw): return {r['part']: r for r in grade(run, **kw)}


def test_accepts_a_true_run(run):
    got = verdict(run)
    assert {k: r['points'] for k, r in got.items()} == {**GRADE_PARTS, 'weights': 0}, 'a made-up run has no weights'
    assert 'could not be asked again' in got['weights']['why']


@pytest.mark.parametrize('column, to', [('value', '0.99'), ('low', '0.9'), ('n_items', '4800'), ('value', 'high'), ('n_images', '')])
def test_refuses_an_edited_table(run, column, to):
    path = run/GRADED_STEPS['scores']/'scores.csv'
    rows = rows_of(path)
    next(r for r in rows if (r['model'], r['condition'], r['slice'], r['metric']) == ('stage2', 'image', 'all', 'strict'))[column] = to
    write_csv(path, rows)
    got = verdict(run)
    assert sum(r['points'] for r in got.values()) == 0 and 'stage2' in got['scores']['why'] and 'refused' in got['picture']['why']


def test_refuses_a_table_with_a_row_removed(run):
    path = run/GRADED_STEPS['scores']/'scores.csv'
    write_csv(path, [r for r in rows_of(path) if r['condition'] != 'blank'])
    assert 'this row is missing' in verdict(run)['scores']['why']


def test_answers_left_out_or_doubled(run):
    path = run/GRADED_STEPS['scores']/'predictions.jsonl'
    log = read_jsonl(path)
    write_jsonl(path, log[:-1])
    assert 'left out' in verdict(run)['answers']['why'] and total(grade(run)) == (5, 20), 'files and losses are there'
    write_jsonl(path, log + log[-1:])
    assert 'twice' in verdict(run)['answers']['why']
    write_jsonl(path, [p for p in log if p['condition'] == 'image'])
    assert 'not asked under blank' in verdict(run)['answers']['why']
    write_jsonl(path, [dict(p, item='other') for p in log])
    assert "'other'" in verdict(run)['answers']['why']
    path.write_text('{"model": "stage2"}\n')
    assert total(grade(run))[0] < 10
    path.write_text('{broken\n')
    assert 'cannot be read' in verdict(run)['scores']['why'] and 'predictions.jsonl' in verdict(run)['scores']['why']


def test_few_images(tmp_path):
    assert 'at least 20' in verdict(made_run(tmp_path/'run', n_images=6))['answers']['why']


@pytest.mark.parametrize('text, why', [('step,loss\n1,3\n2,2\n', 'at least 4'), ('step,loss\n1,3\n2,nan\n3,1\n4,1\n', 'nan at step 2'), ('a,b\n1,2\n', 'columns'),
                                       ('step,loss\n1,1\n2,2\n3,3\n4,4\n', 'does not fall'), ('step,loss\n1,4\n2,3\n1,2\n2,1\n', 'do not rise')])
def test_losses(run, text, why):
    (run/GRADED_STEPS['stage2']/'losses.csv').write_text(text)
    assert why in verdict(run)['losses']['why'] and verdict(run)['losses']['points'] == 0


def test_missing_files_are_named(run, tmp_path):
    shutil.rmtree(run/GRADED_STEPS['scores'])
    got = verdict(run)
    assert '4_evaluation/scores.csv' in got['files']['why'] and set(got) == set(GRADE_PARTS)
    assert total(grade(tmp_path/'nowhere')) == (0, 20)


def test_the_instructors_key_counts(run, tmp_path):
    mine = made_run(tmp_path/'mine')
    key = run/GRADED_STEPS['data']/'vqa/test.json'
    items = read_json(key)
    write_json(key, [dict(o, answer='yes') for o in items])   # the student's copy
    assert verdict(run)['scores']['points'] == 0
    assert verdict(run, key=mine/GRADED_STEPS['data']/'vqa/test.json')['scores']['points'] == 4


@pytest.mark.slow
def test_weights_are_asked_again(run):
    "The shipped base answers as stage 2; then three of four answers are improved by hand, and the table with them."
    from PIL import Image
    from llava_med.evaluate.subjects import LocalModel
    from llava_med.generate.answers import answer
    from llava_med.lab.grading import asked_of
    from llava_med.models.llava import load
    from llava_med.evaluate.exact import score_table
    shutil.copytree(REPO/'data/base_tiny', run/GRADED_STEPS['stage2']/'model')
    model, processor = load(run/GRADED_STEPS['stage2']/'model')
    items, log = read_json(run/GRADED_STEPS['data']/'vqa/test.json'), read_jsonl(run/GRADED_STEPS['scores']/'predictions.jsonl')
    images = run/GRADED_STEPS['data']/'images'
    images.mkdir()
    for i, n in enumerate(sorted({o['images'][0] for o in items})): Image.new('RGB', (96, 96), (9*i, 90, 200 - 8*i)).save(images/n)
    mark = LocalModel(model, processor).fingerprint()['model_hash']
    texts = iter(answer(model, processor, [images/o['images'][0] for o in items], [o['question'] for o in items]))
    log = [dict(p, text=next(texts), model_hash=mark) if (p['model'], p['condition']) == ('stage2', 'image') else p for p in log]

    def hand_in(log):
        write_jsonl(run/GRADED_STEPS['scores']/'predictions.jsonl', log)
        write_csv(run/GRADED_STEPS['scores']/'scores.csv', score_table(items, log, asked_of(log), 'wrong', 500))
        return verdict(run)
    assert hand_in(log)['weights']['points'] == 4
    right = {o['id']: o['answer'] for o in items}
    got = hand_in([dict(p, text=right[p['item']]) if (p['model'], p['condition']) == ('stage2', 'image') else p for p in log])
    assert sum(r['points'] for r in got.values()) == 0 and 'come out again' in got['weights']['why']
    assert hand_in([dict(p, model_hash='0'*16) if p.get('model_hash') else p for p in log])['weights']['points'] == 0


SAME = {  # right answers in another spelling
    '1.3': lambda c, m: read_claims(m).findings.keys() - read_claims(c).findings.keys(),
    '1.4': lambda d, n: pd.Series(d)/(n - pd.Series(d).cumsum().shift(fill_value=0)),
    '1.5': lambda a, b: np.intersect1d([o['patient'] for o in a], [o['patient'] for o in b]),
    '2.2': lambda x, w, b: torch.nn.functional.linear(*map(torch.tensor, (x, w, b))),
    '2.4': lambda s: ['language_model', 'projector'][2 - s:],
    '3.1': lambda ids, n: torch.tensor([-100]*n + ids[n:]),
    '3.5': lambda q, k, sq, sk: np.bool_(q >= k and not sk*(sq - sk)),
    '4.1': lambda p: np.prod(p, 1).mean(),
    '5.2': lambda m, box: torch.tensor(all(a < (i + .5)/4 < a + w for i, a, w in zip((m.argmax() % 4, m.argmax()//4), box, box[2:]))),
    '6.3': lambda s: s and s.startswith('CC') and 'NC' not in s,
}


@pytest.mark.parametrize('k', SAME)
def test_check_takes_a_right_answer_however_it_is_written(k):
    heard = []
    assert check(k, SAME[k], heard.append), heard


def test_a_map_that_never_points_gets_no_hint_about_corners():
    heard = []
    assert not check('5.2', lambda m, box: False, heard.append) and 'width and height' not in heard[0].split('Read again')[0]
