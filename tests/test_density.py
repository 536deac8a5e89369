"""Code that can be read at a glance: the width of lines, the size of cells and functions, and how much a line holds."""
import ast
import re
import statistics
from pathlib import Path

import nbformat
import pytest

REPO = Path(__file__).parent.parent
WIDTH, CELL, BODY, MEDIAN = 100, 40, 40, 15   # columns, lines, lines, lines
COMPREHENSIONS = 4                            # in a hundred lines
ROOMS = sorted(p.name for p in (REPO/'nbs').iterdir()
               if p.is_dir() and re.match(r'\d\d_|recipes$', p.name))
# rooms that are not yet written this way; a room leaves the list when its code keeps the rules
LATER = ()
FRONT = ('pipeline', 'course', 'benchmarks', 'pages', 'start.ipynb', 'index.ipynb')
LATER_FRONT = ()


def code_cells(room):
    "(notebook, source, whether it is exported) of all code cells of a notebook or a folder."
    place = REPO/'nbs'/room
    for path in sorted(place.rglob('*.ipynb')) if place.is_dir() else [place]:
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type != 'code': continue
            exported = re.search(r'^#\s*\|\s*exporti?\b', cell.source, re.M)
            yield path.relative_to(REPO), cell.source, bool(exported)


def filled(source):
    "Lines that are not empty."
    return [s for s in source.splitlines() if s.strip()]


def wide(source): return [s for s in source.splitlines() if len(s) > WIDTH]


def tree_of(source):
    "The parsed cell; None where it holds a magic or a shell command."
    try: return ast.parse(source)
    except SyntaxError: return None


COMPREHENSION = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


def comprehensions(tree): return sum(isinstance(n, COMPREHENSION) for n in ast.walk(tree))


def nested(tree):
    "Lines with a comprehension inside another, or with two loops in one."
    out = []
    for n in ast.walk(tree):
        if not isinstance(n, COMPREHENSION): continue
        inner = [m for m in ast.walk(n) if isinstance(m, COMPREHENSION) and m is not n]
        if inner: out.append(n.lineno)
    return out


def long_bodies(tree):
    "Functions whose bodies have too many lines."
    defs = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [n.name for n in defs if n.end_lineno - n.body[0].lineno + 1 > BODY]


def measure(room):
    "What a room's code breaks, and its two averages."
    wrong, sizes, count, lines = [], [], 0, 0
    for path, source, exported in code_cells(room):
        wrong += [f'{path}: {len(s)} columns: {s.strip()[:60]}' for s in wide(source)]
        if not exported: continue
        size, tree = len(filled(source)), tree_of(source)
        sizes.append(size)
        if size > CELL: wrong.append(f'{path}: an exported cell of {size} lines: {source[:60]!r}')
        if tree is None: continue
        count, lines = count + comprehensions(tree), lines + size
        wrong += [f'{path}: comprehension in a comprehension: {source.splitlines()[n - 1]}'
                  for n in nested(tree)]
        wrong += [f'{path}: body of {name} over {BODY} lines' for name in long_bodies(tree)]
    return wrong, statistics.median(sizes) if sizes else 0, 100*count/max(lines, 1)


@pytest.mark.parametrize('room', [r for r in ROOMS if r not in LATER])
def test_a_room_can_be_read_at_a_glance(room):
    wrong, median, each = measure(room)
    assert not wrong, '\n'.join(wrong[:20])
    assert median <= MEDIAN, f'{room}: the median exported cell has {median} lines'
    assert each <= COMPREHENSIONS, f'{room}: {each:.1f} comprehensions in 100 lines'


@pytest.mark.parametrize('room', [r for r in FRONT if r not in LATER_FRONT])
def test_cells_that_are_no_library_are_narrow(room):
    wrong = [f'{path}: {s[:60]}' for path, source, _ in code_cells(room) for s in wide(source)]
    assert not wrong, '\n'.join(wrong[:20])


def test_the_first_line_of_a_module_is_narrow():
    "It is the sentence below a chapter's title."
    first = {p: p.read_text(encoding='utf-8').split('\n', 1)[0] for p in (REPO/'llava_med').rglob('*.py')}
    assert len(first) > 100 and not [f'{p.name}: {s}' for p, s in first.items() if wide(s)]


def test_the_rules_can_fail():
    assert wide('x'*101) and not wide('x'*100)
    assert nested(ast.parse('[[a for a in b] for b in c]')) == [1]
    assert not nested(ast.parse('[a for a in b]'))
    assert comprehensions(ast.parse('{a for a in b} | {c: 1 for c in d}')) == 2
    body = '\n'.join(' x = 1' for _ in range(41))
    assert long_bodies(ast.parse(f'def f():\n{body}')) == ['f']


if __name__ == '__main__':
    import sys
    for room in sys.argv[1:] or [*ROOMS, *FRONT]:
        wrong, median, each = measure(room)
        print(f'{room}: {len(wrong)} breaches, median exported cell {median}, '
              f'{each:.1f} comprehensions in 100 lines')
        if sys.argv[1:]: print(*wrong, sep='\n')
