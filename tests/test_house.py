"The rules of the repository: what is written in notebooks, and what may be committed."
import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tokenize
from configparser import ConfigParser
from io import StringIO
from pathlib import Path

import nbformat
import pytest
import yaml
from llava_med.core.imports import imported_names

REPO = Path(__file__).resolve().parents[1]
name = lambda p: p.relative_to(REPO).as_posix()


def notebooks(folder, *but):
    "The notebooks below a folder of nbs/, at any depth; private ones and those below the folders in `but` are left out."
    home = REPO/'nbs'/folder
    inside = lambda p: p.relative_to(home).parts
    return sorted(p for p in home.rglob('*.ipynb') if inside(p)[0] not in but and not any(x.startswith(('_', '.')) for x in inside(p)))


PIPELINE, FRONT = notebooks('pipeline'), notebooks('pages')
OTHERS = notebooks('benchmarks') + notebooks('course') + FRONT
CHAPTERS = notebooks('', 'pipeline', 'benchmarks', 'course', 'recipes', 'pages')
RECIPES = notebooks('recipes')
NOTEBOOKS = CHAPTERS + RECIPES + PIPELINE + OTHERS
PAGES = ('index', 'start')   # chapters that export nothing
PRESETS = sorted((REPO/'nbs/pipeline/presets').rglob('*.yaml'))
MODULES = sorted(p for p in (REPO/'llava_med').rglob('*.py') if p.name not in ('__init__.py', '_modidx.py'))
TESTS = sorted((REPO/'tests').rglob('test_*.py'))
LEAST = dict(CHAPTERS=115, RECIPES=12, PIPELINE=7, OTHERS=38, PRESETS=16, MODULES=120, TESTS=82)   # what there is
each = lambda paths: pytest.mark.parametrize('path', paths, ids=name)


# The rules, each a function of a notebook or a file that returns what is wrong

def bad_cells(nb):
    "Cells without id, execution counts, errors, widget state, and tags that papermill punishes."
    found, ids = [], [c.get('id') for c in nb.cells]
    if None in ids or nb.nbformat_minor < 5: found.append('a cell has no id')
    if len(set(ids)) < len(ids): found.append('two cells have one id')
    if 'widgets' in nb.metadata: found.append('widget state in the metadata')
    for c in nb.cells:
        at = f"cell {c.get('id')}"
        if c.get('execution_count') is not None: found.append(f'{at}: execution count')
        tags = c.metadata.get('tags', [])
        if set(tags) - {'parameters'}: found.append(f'{at}: tag {tags}')
        for o in c.get('outputs', []):
            if o.get('execution_count') is not None: found.append(f'{at}: execution count of an output')
            if o.output_type == 'error': found.append(f'{at}: {o.ename} in its output')
            if any('widget' in k for k in o.get('data', {})): found.append(f'{at}: a widget in its output')
    return found


def raw(path):
    "A notebook as it is in the file: nbformat.read would give ids to cells that have none."
    return nbformat.from_dict(json.loads(path.read_text()))


MACHINE = re.compile(r'''(?<![\w.:/])/(?:home|root|tmp|work|Users|workspace|mnt|private|var/folders)/[\w.-]+|[A-Z]:\\\\?Users''')


def machine_paths(nb):
    "Paths of somebody's machine, in sources and outputs."
    texts = [c.source for c in nb.cells] + [json.dumps({k: v for k, v in o.items() if k != 'data'}) for c in nb.cells for o in c.get('outputs', [])]
    texts += [str(v) for c in nb.cells for o in c.get('outputs', []) for k, v in o.get('data', {}).items() if not k.startswith('image/')]
    return [m[0] for t in texts for m in MACHINE.finditer(t)]


def large_images(nb, limit=50_000):
    "Images larger than 50 kB."
    return [f"cell {c.id}: {len(v)*3//4} bytes" for c in nb.cells for o in c.get('outputs', [])
            for k, v in o.get('data', {}).items() if k.startswith('image/') and len(v)*3//4 > limit]


def tagged(nb): return [c for c in nb.cells if 'parameters' in c.metadata.get('tags', [])]


def bad_parameters(source):
    "Lines that papermill's own parser would overlook or mangle, and that are not `name: type = literal  # comment`."
    found = []
    notes = {t.start[0]: t.string for t in tokenize.generate_tokens(StringIO(source).readline) if t.type == tokenize.COMMENT}
    for node in ast.parse(source).body:
        line = source.splitlines()[node.lineno - 1]
        if not isinstance(node, ast.AnnAssign): found.append(f'{line!r} is not typed'); continue
        try: value = ast.literal_eval(node.value)
        except ValueError: found.append(f'{line!r} is not a literal'); continue
        if node.end_lineno != node.lineno: found.append(f'{line!r} goes over several lines')
        if not notes.get(node.lineno): found.append(f'{line!r} has no comment')
        if '=' in notes.get(node.lineno, ''): found.append(f'{line!r} has = in its comment')
        if ';' in line.split('#')[0]: found.append(f'{line!r} holds two statements')
        if '#' in str(value): found.append(f'{line!r} has # in its value')
    names = [n.target.id for n in ast.parse(source).body if isinstance(n, ast.AnnAssign)]
    found += [f'{n} is missing' for n in ('run', 'inputs_from', 'seed', 'device', 'threads') if n not in names]
    return found


def imports_of(source, package=''):
    "Modules of the library that a source imports, at any depth of its code, such as core.runs; `package` is its own, for relative imports."
    return imported_names(source, package) & set(map(module_of, MODULES))


def code_lines(source):
    "Lines that are not blank and not nbdev's markers."
    return [x for x in source.splitlines() if x.strip() and not re.match(r'# %% |# AUTO|__all__', x)]


PLACE = re.compile(r'(\d\d)_([a-z]+)/(\d\d)_([a-z]+(?:_[a-z]+)*)\.ipynb')   # of a chapter: package and module, each with its number
RANKS = dict(core=0, world=1, models=1, data=2, train=3, generate=4, evaluate=5, explain=6, ui=7, lab=7, recipes=8)   # a package imports from lower ranks only
module_of = lambda p: '.'.join(p.relative_to(REPO/'llava_med').with_suffix('').parts)


def exports(path):
    "The module that a notebook exports, such as core.runs, or None."
    text = '\n'.join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'code')
    m = re.search(r'^#\s*\|\s*default_exp\s+([\w.]+)', text, re.M)
    return m and m[1]


def chapter_numbers():
    "Module → number of its chapter within its package, from all notebooks."
    number = lambda p: int(p.name[:2]) if re.match(r'\d\d_', p.name) else 99   # a recipe imports no other one, and is imported by none
    return {m: number(p) for p in CHAPTERS + RECIPES if p.stem not in PAGES and (m := exports(p))}


def upward(module, imported, numbers):
    "Which of the imported modules a module may not import: those of the same or a higher rank, later ones of its own package, and the synthetic world."
    package = lambda m: m.split('.')[0]
    def wrong(m):
        if package(m) == 'world' and not (package(module) in ('world', 'recipes') or module == 'lab.grading'): return True
        if package(m) == package(module): return numbers.get(m, 0) >= numbers.get(module, 0)
        return RANKS.get(package(m), 99) >= RANKS[package(module)]
    return sorted(m for m in imported if wrong(m))


# A collection that has become empty would make every test over it green

def too_few(counts): return {k: (n, LEAST[k]) for k, n in counts.items() if n < LEAST[k]}


def test_no_collection_has_shrunk():
    assert not too_few({k: len(globals()[k]) for k in LEAST}), 'tests over a shrunken collection test too little; a lower number is written down here on purpose only'


def test_nbdev_tests_every_chapter():
    from nbdev.config import get_config
    from nbdev.doclinks import nbglob
    found = {Path(p).resolve() for p in nbglob(get_config(cfg_name='settings.ini', path=REPO).nbs_path) if not Path(p).with_name('.notest').exists()}
    assert found >= set(CHAPTERS) and not found & set(PIPELINE + OTHERS + RECIPES)


# All notebooks

@each(NOTEBOOKS)
def test_cells(path): assert not bad_cells(raw(path))


@each(NOTEBOOKS)
def test_no_machine_paths(path): assert not machine_paths(nbformat.read(path, 4))


@each(NOTEBOOKS)
def test_outputs_are_those_of_a_run_with_the_real_files(path):
    said = [o for c in nbformat.read(path, 4).cells for o in c.get('outputs', [])]
    assert 'No test data here' not in str(said), 'run it again with LLAVA_MED_TESTDATA set'


@each(NOTEBOOKS)
def test_size(path):
    assert not large_images(nbformat.read(path, 4))
    limit = 400_000 if path in PIPELINE else 200_000
    if path not in OTHERS: assert path.stat().st_size <= limit


@each(NOTEBOOKS)
def test_kernel_is_python3(path): assert nbformat.read(path, 4).metadata.kernelspec.name == 'python3'


@each(NOTEBOOKS)
def test_no_export_cell_and_no_shell(path):
    for c in nbformat.read(path, 4).cells:
        if c.cell_type != 'code': continue
        assert 'nbdev_export(' not in c.source
        if re.match(r'#\s*\|\s*export', c.source): assert not re.search(r'^\s*[%!]', c.source, re.M)


@each([p for p in CHAPTERS + RECIPES + PIPELINE + FRONT if p.stem != 'index'])
def test_opening_and_end(path):
    cells = nbformat.read(path, 4).cells
    assert re.match(r'# .+\n+> .+', cells[0].source), 'begins with a title and one line that says what one will have'
    assert 'markdown' in [c.cell_type for c in cells[1:3]], 'then says what goes in, what comes out, and how long it takes'
    headings = [x for c in cells if c.cell_type == 'markdown' for x in c.source.splitlines() if x.startswith('## ')]
    if path in CHAPTERS + RECIPES: assert '## What you have now' in headings and '## Try' in headings


def links(text):
    "Relative targets of the links and pictures in a Markdown text, without anchors; code is not prose."
    prose = re.sub(r'(?s)```.*?```|`[^`\n]*`', '', text)
    found = re.findall(r'\]\(([^)\s]+)', prose) + re.findall(r'(?:href|src)=["\']([^"\']+)', prose)
    return [x.split('#')[0] for x in found if not re.match(r'[a-z]+:|#', x)]


def markdown_of(nb):
    "Prose and Markdown outputs of a notebook."
    outputs = [o.get('data', {}).get('text/markdown', '') for c in nb.cells for o in c.get('outputs', [])]
    return '\n\n'.join([c.source for c in nb.cells if c.cell_type == 'markdown'] + outputs)


def dead_links(text, folder):
    "Relative links that lead nowhere."
    return [x for x in links(text) if not (folder/x).resolve().exists() or x.startswith('/')]


@each(NOTEBOOKS)
def test_links_of_notebooks(path): assert not dead_links(markdown_of(nbformat.read(path, 4)), path.parent)


@each([REPO/f for f in ('README.md', 'outputs/README.md', 'data/README.md')])
def test_links_of_pages(path): assert not dead_links(path.read_text(), path.parent)


# The home page

def test_readme_is_made_from_the_index():
    from llava_med.lab.publishing import as_readme
    index = nbformat.read(REPO/'nbs/index.ipynb', 4)
    assert (REPO/'README.md').read_text() == as_readme(index), 'make readme'


def test_index_shows_the_example_results():
    from llava_med.lab.publishing import example_tables, relink, demo_table
    assert demo_table() in markdown_of(nbformat.read(REPO/'nbs/index.ipynb', 4)), 'make readme'
    results = markdown_of(nbformat.read(REPO/'nbs/pages/results.ipynb', 4))
    assert relink(example_tables(), '..') in results, 'make readme'


def test_pages_show_the_measurements():
    from llava_med.lab.publishing import ablation_table, benchmark_table, relink
    for name, table in (('benchmarks', benchmark_table()), ('ablations', ablation_table())):
        page = markdown_of(nbformat.read(REPO/f'nbs/pages/{name}.ipynb', 4))
        assert relink(table, '..') in page and table.count('\n') > 10, 'make readme'


def test_the_real_model_joins_the_table_when_it_is_measured(tmp_path, monkeypatch):
    from llava_med.core.runs import write_json
    from llava_med.lab.publishing import real_row, demo_table
    rows = [dict(work='both, 0', metric=f'{c} strict', value=.5, low=.4, high=.6)
            for c in ('image', 'blank', 'shuffled', 'image-blank')]
    shutil.copytree(REPO/'outputs/example', tmp_path/'outputs/example')
    monkeypatch.setenv('LLAVA_MED_ROOT', str(tmp_path))
    assert real_row() == [] and '[real]' not in demo_table()
    file = tmp_path/'nbs/benchmarks/results/real_small.json'
    write_json(file, dict(best='both', questions=1061, rows=rows))
    last = demo_table().splitlines()[-1]
    assert last.startswith('| [real](benchmarks/real_small.ipynb)') and last.endswith('| 1061 |')
    assert last.count('0.500 [0.40, 0.60]') == 3 and '+0.500 [+0.40, +0.60]' in last
    write_json(file, dict(best=None, questions=0, rows=[]))
    assert real_row() == []


def test_the_page_of_data_is_made_from_the_catalogue():
    from llava_med.data.catalogue import data_page
    assert (REPO/'data/README.md').read_text(encoding='utf-8') == data_page(), 'make readme'


def test_one_page_names_every_notebook():
    page = REPO/'nbs/pages/chapters.ipynb'
    found = {(page.parent/x).resolve() for x in links(markdown_of(nbformat.read(page, 4)))}
    wanted = [p for p in CHAPTERS + RECIPES + PIPELINE + OTHERS if p.stem != 'index' and p not in FRONT]
    missing = sorted(name(p) for p in wanted if p not in found)
    assert not missing, f'make readme: nbs/pages/chapters.ipynb names no {missing}'


# Chapters and the library

def exported(folder):
    "Module → text, of the library exported into a copy of the repository's notebooks."
    shutil.copy(REPO/'settings.ini', folder)
    shutil.copytree(REPO/'nbs', folder/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints', '_*.ipynb', '*.tmp'))
    for extra in ('README.md', 'pyproject.toml'):
        if (REPO/extra).exists(): shutil.copy(REPO/extra, folder)
    subprocess.run([sys.executable, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()'], cwd=folder, check=True,
                   capture_output=True)
    return library(folder)


def library(folder):
    "Module → text. The index of names is compared where the repository has it."
    return {p.relative_to(folder).as_posix(): p.read_text() for p in (folder/'llava_med').rglob('*.py')
            if p.name != '_modidx.py' or (REPO/'llava_med/_modidx.py').exists()}


def test_library_is_what_the_notebooks_say(tmp_path):
    there, here = exported(tmp_path), library(REPO)
    assert sorted(there) == sorted(here), 'make export; a module without notebook is deleted by hand'
    differ = [m for m in there if there[m] != here[m]]
    assert not differ, f'make export: {differ} differ from the notebooks'


def test_one_number_one_chapter_one_module():
    chapters = {p.relative_to(REPO/'nbs').as_posix(): exports(p) for p in CHAPTERS if p.stem not in PAGES}
    bad = [f for f, m in chapters.items() if not (found := PLACE.fullmatch(f)) or m != f'{found[2]}.{found[4]}']
    assert not bad, f'{bad}: a chapter is named NN_package/NN_noun.ipynb and exports package.noun'
    numbers = [PLACE.fullmatch(f)[1] + PLACE.fullmatch(f)[3] for f in chapters]
    assert len(set(numbers)) == len(numbers)
    packages = {PLACE.fullmatch(f)[2]: PLACE.fullmatch(f)[1] for f in chapters}
    assert sorted(packages, key=packages.get) == [p for p in RANKS if p != 'recipes']
    assert sorted([*chapters.values(), *filter(None, map(exports, RECIPES))]) == sorted(map(module_of, MODULES))


def test_every_package_is_known():
    assert {module_of(p).split('.')[0] for p in MODULES} <= set(RANKS)


@each(MODULES)
def test_imports_go_down(path):
    module = module_of(path)
    imported = imports_of(path.read_text(), module.split('.')[0])
    assert not upward(module, imported, chapter_numbers())


def private_imports(text):
    "Private names that a module takes from another package."
    found = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom) and n.level > 1]
    return [a.name for n in found for a in n.names if a.name.startswith('_')]


@each(MODULES)
def test_packages_keep_their_private_names(path):
    assert not private_imports(path.read_text())


def test_a_private_import_is_found():
    assert private_imports('from ..data.vqa import _a, b\nfrom .c import _d') == ['_a']


@each(MODULES)
def test_module_can_be_read_at_one_sitting(path):
    text = path.read_text()
    assert len(code_lines(text)) <= 600
    assert 'fastcore' not in ' '.join(x for x in text.splitlines() if 'import' in x), 'fastcore is a development tool only'
    assert 'import *' not in text and 'os.getcwd' not in text


def undocumented(text):
    "Public functions and methods without a docstring, or with a parameter that has no comment on its line."
    notes = {t.start[0] for t in tokenize.generate_tokens(StringIO(text).readline) if t.type == tokenize.COMMENT}
    tops = [n for n in ast.parse(text).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    inner = [k for n in tops if isinstance(n, ast.ClassDef) and not n.name.startswith('_') for k in n.body if isinstance(k, ast.FunctionDef)]
    found = [n.name for n in tops if not n.name.startswith('_') and not ast.get_docstring(n)]
    for f in [n for n in tops + inner if isinstance(n, ast.FunctionDef) and (n.name == '__init__' or not n.name.startswith('_'))]:
        found += [f'{f.name}({a.arg})' for a in f.args.posonlyargs + f.args.args + f.args.kwonlyargs
                  if a.arg not in ('self', 'cls', 'rng') and a.lineno not in notes]
    return found


@each(MODULES)
def test_names_and_parameters_are_documented(path): assert not undocumented(path.read_text())


# A rule that cannot fail is no rule

def broken():
    "A notebook with every fault."
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('1', id='a'), nbformat.v4.new_code_cell('2', id='a')])
    nb.cells[1]['id'] = 'a'                             # nbformat gave it another
    nb.cells[0].execution_count = 3
    nb.cells[0].metadata['tags'] = ['raises-exception']
    nb.cells[0].outputs = [nbformat.v4.new_output('error', ename='ValueError', evalue='x', traceback=[]),
                           nbformat.v4.new_output('display_data', data={'application/vnd.jupyter.widget-view+json': {}, 'image/png': 'A'*80_000}),
                           nbformat.v4.new_output('stream', text='saved to /home/' + 'someone/x.csv')]
    nb.metadata['widgets'] = {}
    return nb


def test_the_rules_can_fail():
    assert too_few(dict(CHAPTERS=0, PIPELINE=7, MODULES=900)) == {'CHAPTERS': (0, LEAST['CHAPTERS'])}
    found = ' '.join(bad_cells(broken()))
    for word in ('one id', 'execution count', 'raises-exception', 'ValueError', 'a widget', 'widget state'): assert word in found
    assert machine_paths(broken()) == ['/home/' + 'someone']
    assert large_images(broken())
    nb = broken(); del nb.cells[0]['id']
    assert 'a cell has no id' in bad_cells(nb)
    for source in ('n = 1  # a', 'n: int = 1', 'n: int = 1+k  # a', 'n: int = 1  # a = b', 'n: int = 1; m: int = 2  # a',
                   "s: str = 'a # b'  # a", 'n: list = [1,\n 2]  # a'):
        assert [f for f in bad_parameters(source) if 'missing' not in f], source
    assert 'seed is missing' in bad_parameters('n: int = 1  # a')
    assert undocumented('def f(a): ...\ndef g(\n    b, # a length\n): "That."\nclass K:\n    "Those."\n    def h(self, c): ...') == ['f', 'f(a)', 'h(c)']
    source = 'from llava_med.core.runs import x\ndef f():\n    import llava_med.models.llava\n    from .vqa import y\n    from ..core import runs as r, vocabulary\n    from . import jats'
    assert imports_of(source, 'data') == {'core.runs', 'models.llava', 'data.vqa', 'core.vocabulary', 'data.jats'}
    assert imports_of('from llava_med.data import vqa\nfrom llava_med import data\nimport os') == {'data.vqa'}
    numbers = {'data.vqa': 14, 'data.jats': 2}
    assert upward('data.jats', {'core.runs', 'data.vqa', 'models.llava', 'train.loop', 'recipes.dpo', 'gone.x'}, numbers) == ['data.vqa', 'gone.x', 'recipes.dpo', 'train.loop']
    assert upward('recipes.dpo', {'recipes.study', 'recipes.ppo'}, {'recipes.study': 1, 'recipes.dpo': 99, 'recipes.ppo': 99}) == ['recipes.ppo']
    assert upward('world.scenes', {'models.llava'}, {}) == ['models.llava'] and not upward('lab.grading', {'world.scenes', 'explain.maps'}, {})
    assert upward('data.claims', {'world.scenes', 'core.vocabulary'}, {}) == ['world.scenes']   # real data know no synthetic world
    assert len(code_lines('# %% ../nbs/x.ipynb 3\n\na = 1\n')) == 1
    assert dead_links('[a](none.ipynb#x) ![b](https://x.org/y.png) [c](#here) `d[0](e)` [f](settings.ini)', REPO) == ['none.ipynb']
    assert [bool(PLACE.fullmatch(f)) for f in ('01_a/01_b.ipynb', '01_a/12_b_c.ipynb', '01_b.ipynb', '1_a/01_b.ipynb', '01_a/01B.ipynb', '01_a/01_b/c.ipynb')] == [True, True, False, False, False, False]


def test_the_sync_check_can_fail(tmp_path):
    here = library(REPO)
    key = 'llava_med/core/runs.py'
    first = exported(tmp_path)[key]
    p = tmp_path/'nbs/00_core/02_runs.ipynb'
    nb = nbformat.read(p, 4)
    nb.cells.append(nbformat.v4.new_code_cell('#| export\nlater = 1'))
    nbformat.write(nb, p)
    subprocess.run([sys.executable, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()'], cwd=tmp_path, check=True, capture_output=True)
    assert library(tmp_path)[key] != first


# One name, one meaning

SHARED = {'world_sample', 'WORLD_LABELS'}   # the two worlds of the base model answer to the same names: `0_base_model` names one of them


def public_names(text):
    "The names that a module defines for others."
    found = set()
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): found.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        found |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return {n for n in found if not n.startswith('_')}


def in_several(texts):
    "Name → modules, where more than one module defines it."
    where = {}
    for module, text in texts.items():
        for n in public_names(text): where.setdefault(n, []).append(module)
    return {n: ms for n, ms in where.items() if len(ms) > 1}


def test_no_public_name_stands_in_two_modules():
    found = in_several({module_of(p): p.read_text() for p in MODULES})
    assert set(found) == SHARED, {n: ms for n, ms in found.items() if n not in SHARED}


def test_names_in_two_modules_are_found():
    assert in_several({'a.x': 'N, M = 1, 2\ndef f(): ...\n_p = 3', 'b.y': 'class f: ...\nN: int = 2\n_p = 4'}) == {'N': ['a.x', 'b.y'], 'f': ['a.x', 'b.y']}
