"The field's words: what was given up for them does not come back. The list is banned_words.yaml; this is what reads it."
import ast
import io
import re
import tokenize
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import nbformat
import pytest
import yaml

REPO = Path(__file__).resolve().parents[1]
LIST = yaml.safe_load((REPO/'tests/banned_words.yaml').read_text(encoding='utf-8'))
PHRASES = {old: new for section in LIST['phrases'].values() for old, new in section.items()}


# What is read

def plain(source):
    "Python without the lines that only IPython knows."
    lines = source.splitlines()
    if lines and lines[0].startswith('%%'): return ''
    return '\n'.join(re.sub(r'^(\s*)[%!].*', r'\1pass', x) for x in lines)


def exported_name(cells):
    "The module that a notebook exports, such as train.loop; empty where it exports none."
    text = '\n'.join(c.source for c in cells if c.cell_type == 'code')
    found = re.search(r'^#\s*\|\s*default_exp\s+([\w.]+)', text, re.M)
    return found[1] if found else ''


def of_notebook(path):
    "(file, place, kind, text) of each cell; a place is a module, or a path below nbs/ without ending."
    cells = nbformat.read(path, 4).cells
    file = path.relative_to(REPO).as_posix()
    place = exported_name(cells) or path.relative_to(REPO/'nbs').with_suffix('').as_posix()
    return [(file, place, 'code' if c.cell_type == 'code' else 'prose', c.source) for c in cells]


def of_library(path):
    place = '.'.join(path.relative_to(REPO/'llava_med').with_suffix('').parts)
    return [(path.relative_to(REPO).as_posix(), place, 'code', path.read_text(encoding='utf-8'))]


def of_settings(path):
    "A preset or a grid."
    kind = path.relative_to(REPO/'nbs/pipeline').parts[0].removesuffix('s')
    file = path.relative_to(REPO).as_posix()
    return [(file, f'{kind}/{path.stem}', 'yaml', path.read_text(encoding='utf-8'))]


@cache
def sources():
    "All texts that are looked at."
    inside = lambda p: not any(x.startswith(('_', '.')) for x in p.relative_to(REPO/'nbs').parts if x != '_template')
    books = [t for p in sorted((REPO/'nbs').rglob('*.ipynb')) if inside(p) for t in of_notebook(p)]
    modules = [t for p in sorted((REPO/'llava_med').rglob('*.py')) if p.name != '_modidx.py' for t in of_library(p)]
    pipeline = REPO/'nbs/pipeline'
    presets = [t for p in sorted([*pipeline.glob('presets/**/*.yaml'), *pipeline.glob('grids/*.yaml')]) for t in of_settings(p)]
    readme = ('README.md', 'README', 'prose', (REPO/'README.md').read_text(encoding='utf-8'))
    return [s for s in [*books, *modules, *presets, readme] if s[0] not in LIST['except']]


# What is found in a text

def all_names(node):
    "The identifiers of one node of a syntax tree."
    own = [getattr(node, k, None) for k in ('id', 'attr', 'arg', 'name', 'asname')]
    return {n for text in own if isinstance(text, str) for n in text.split('.')}


def parameter_names(node):
    "Those that name a parameter of a function, a keyword of a call, or a typed field."
    if isinstance(node, (ast.arg, ast.keyword)): return {node.arg}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name): return {node.target.id}
    return set()


def yaml_keys(text): return set(re.findall(r'([A-Za-z_]\w*) *:', text))


def banned_names(kind, text, names, of=all_names):
    "Which of some names a text of code or settings has."
    if kind == 'yaml': return sorted(yaml_keys(text) & set(names))
    if kind != 'code': return []
    found = {n for node in ast.walk(ast.parse(plain(text))) for n in of(node)}
    return sorted(found & set(names))


def words_of(kind, text):
    "The prose in a text: all of it, or the comments and strings of code."
    if kind != 'code': return text
    tokens = tokenize.generate_tokens(io.StringIO(plain(text) + '\n').readline)
    comments = [t.string for t in tokens if t.type == tokenize.COMMENT]
    strings = [n.value for n in ast.walk(ast.parse(plain(text)))
               if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return '\n\n'.join([*comments, *strings])


def banned_phrases(kind, text, phrases):
    "Which of some phrases the prose of a text has, also over the end of a line."
    prose, found = words_of(kind, text), []
    for p in phrases:
        pattern = r'(?<!\w)' + r'\s+'.join(map(re.escape, p.split())) + r'(?!\w)'
        if re.search(pattern, prose, 0 if p != p.lower() else re.IGNORECASE): found.append(p)
    return found


def banned_parameters(place, kind, text, sections=LIST['parameters']):
    "Old parameter names in a module, notebook, preset or grid, with the new ones."
    names = {old: new for where, own in sections.items() if fnmatch(place, where)
             for old, new in own.items()}
    return {n: names[n] for n in banned_names(kind, text, names, parameter_names)} if names else {}


def said(hits): return '\n'.join(f'{file}: write {new} for {old}' for file, old, new in dict.fromkeys(hits))


# The rules

def test_no_name_that_was_given_up():
    names = LIST['names']
    hits = [(file, n, names[n]) for file, _, kind, text in sources() for n in banned_names(kind, text, names)]
    assert not hits, said(hits)


def test_no_parameter_that_was_given_up():
    hits = [(file, old, new) for file, place, kind, text in sources()
            for old, new in banned_parameters(place, kind, text).items()]
    assert not hits, said(hits)


def test_no_phrase_that_was_given_up():
    hits = [(file, p, PHRASES[p]) for file, _, kind, text in sources()
            for p in banned_phrases(kind, text, PHRASES)]
    assert not hits, said(hits)


# A rule that cannot fail is no rule

def test_every_word_has_a_better_one():
    sections = [LIST['names'], *LIST['parameters'].values(), *LIST['phrases'].values()]
    for old, new in (pair for s in sections for pair in s.items()):
        assert isinstance(old, str) and isinstance(new, str) and new.strip() and old != new, old
    assert all((REPO/f).is_file() for f in LIST['except'])


def test_all_kinds_of_files_are_read():
    files = {s[0] for s in sources()}
    assert {'README.md', 'nbs/04_train/09_loop.ipynb', 'llava_med/train/loop.py', 'nbs/pipeline/presets/tiny.yaml',
            'nbs/pipeline/grids/real_small.yaml', 'nbs/course/4_scores.ipynb', 'nbs/index.ipynb'} <= files
    assert {s[1] for s in sources()} >= {'train.loop', 'pipeline/3_stage2_tuning', 'preset/tiny', 'grid/real_small', 'README'}


@pytest.mark.parametrize('code', ['old = 1', 'x.old()', 'f(old=2)', 'def old(): ...', 'class old: ...', 'from a import old', 'import old.b',
                                  'def f(old): ...', "f'{old}'", 'old: int = 1', '%time f(1)\nold()', 'import a as old', 'def f(*, old=1): ...'])
def test_a_planted_name_is_found(code):
    assert banned_names('code', code, {'old': 'new'}) == ['old']


def test_a_word_beside_a_banned_name_is_not_found():
    for code in ('older = 1', "x = 'old'  # old", 'f(new=1)', '%old'): assert not banned_names('code', code, {'old': 'new'})
    assert not banned_names('prose', 'old', {'old': 'new'})


def test_a_planted_parameter_is_found_in_its_place_only():
    sections = {'train.*': {'old': 'new'}, 'preset*': {'old': 'new'}}
    for code in ('f(old=2)', 'def f(old): ...', 'class K:\n    old:int = 1'):
        assert banned_parameters('train.loop', 'code', code, sections) == {'old': 'new'}
        assert not banned_parameters('data.vqa', 'code', code, sections)
    assert not banned_parameters('train.loop', 'code', 'old = 2\nx.old', sections)
    assert banned_parameters('preset/tiny', 'yaml', 'parameters: {3_stage2_tuning: {epochs: 1, old: 2}}', sections) == {'old': 'new'}
    assert not banned_parameters('preset/tiny', 'yaml', 'epochs: 1   # old', sections)


@pytest.mark.parametrize('kind, text', [('prose', 'What the Towers\nsee, and more.'), ('code', 'x = 1  # towers see'), ('code', 'def f():\n    "The towers  see."'),
                                        ('code', "raise ValueError(f'{x} towers see {y}')"), ('yaml', 'a: 1   # towers see')])
def test_a_planted_phrase_is_found(kind, text):
    assert banned_phrases(kind, text, {'towers see': 'encoders see'}) == ['towers see']


def test_a_phrase_within_other_words_is_not_found():
    for kind, text in (('prose', 'towers seem'), ('code', 'towers_see = 1'), ('prose', 'Two towers. See below')):
        assert not banned_phrases(kind, text, {'towers see': ''})
    assert not banned_phrases('prose', 'here or there', {'Here or There': ''})   # its capitals count


def test_outputs_are_not_read(tmp_path, monkeypatch):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('x = 1', outputs=[nbformat.v4.new_output('stream', text='n_held')])])
    (tmp_path/'nbs').mkdir()
    nbformat.write(nb, tmp_path/'nbs/a.ipynb')
    monkeypatch.setitem(globals(), 'REPO', tmp_path)
    assert of_notebook(tmp_path/'nbs/a.ipynb') == [('nbs/a.ipynb', 'a', 'code', 'x = 1')]
