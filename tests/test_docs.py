"The book: what its pages are made of, whether its links live, and how it opens in a browser without a network."
import ast
import json
import os
import re
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import pytest
from conftest import NO_BROWSER, browser, wait_for
from llava_med.lab.steps import UsageError
from llava_med.lab.book import (BOOK_PARTS, ROOMS, api_page, book_command, book_links, book_page,
    chapter_rows, chapter_table, check_site, configuration, described, library, make_book, name_links,
    opening, package_rows, page_of, folder_table, parts, slug, write_sources)
from llava_med.lab.publishing import relink

REPO = Path(__file__).resolve().parents[1]
NO_BUILDER = '' if all(map(find_spec, ('sphinx', 'furo', 'myst_nb'))) else "Sphinx, Furo or MyST-NB is missing (pip install -c constraints.txt -e '.[dev]')"
until = partial(wait_for, seconds=100)   # what may take long on a busy machine
PAGES = sorted((REPO/'nbs/pages').glob('*.ipynb'))
# Terms of the field that readers search for: each must stand in the glossary
TERMS = ('validation loss', 'validation set', 'validation check', 'early stopping', 'micro-batch',
    'gradient accumulation', 'gradient checkpointing', 'data loader', 'kv cache', 'attention mask',
    'data leakage', 'temperature', 'overfitting', 'hyperparameter', 'learning rate', 'visual tokens',
    'vision encoder', 'projector', 'shared-prefix packing', 'packed sequence', 'perplexity',
    'log-likelihood scoring', 'minimum detectable effect', 'catastrophic forgetting', 'significant')
md, code = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell


# What the pages are made of

def test_every_notebook_has_its_place():
    rows, home = [r[2] for r in chapter_rows()], REPO/'nbs'
    seen = [p.relative_to(home) for p in home.rglob('*.ipynb')]
    seen = [p for p in seen if not any(x.startswith(('_', '.')) for x in p.parts)]
    chapters = [p for p in seen if p.parts[0] not in BOOK_PARTS and len(p.parts) > 1]
    assert len(chapters) >= 57
    assert rows == sorted(p.with_suffix('').as_posix() for p in chapters)
    assert [r[0] for r in chapter_rows()] == [f'{int(f[:2])}.{int(f[f.index("/") + 1:][:2])}' for f in rows]
    listed = [f for files in parts().values() for f in files]
    assert sorted(listed) == sorted(p.as_posix() for p in seen if p.parts[0] in BOOK_PARTS)


def test_every_package_says_what_is_in_it():
    assert [name for _, name, _ in package_rows().values()] == list(ROOMS)
    assert all(what and not what.endswith('.') for what in ROOMS.values())


def test_every_chapter_says_what_one_gets():
    said = {file: line for _, _, file, line in chapter_rows()}
    assert not [f for f, line in said.items() if len(line) < 20 or line.startswith('You can')]
    assert len(set(said.values())) == len(said), 'two chapters promise the same'


@pytest.mark.parametrize('first, title, line', [
    ('# A: b\n\n> After this chapter you can add.', 'A: b', 'Add'),
    ('# A\n> At the end you have a | b', 'A', r'A \| b'), ('# A\n> You know why', 'A', 'Why'),
    ('# A\n> At the end the sums are right', 'A', 'The sums are right'), ('text', 'x', '')])
def test_the_first_cell_is_read(tmp_path, first, title, line):
    nbformat.write(nbformat.v4.new_notebook(cells=[md(first)]), tmp_path/'x.ipynb')
    assert opening(tmp_path/'x.ipynb') == (title, line)


def test_the_course_is_read_in_its_order():
    files = parts()['course']
    assert files[0] == 'course/0_syllabus.ipynb'
    for n in '123456':
        lecture, exercises = [f for f in files if re.match(rf'course/{n}_', f)]
        assert exercises == f'course/{n}_exercises.ipynb' != lecture, 'exercises come after their lecture'


def shown(name):
    "What a page of nbs/pages/ shows: prose and computed tables."
    nb = nbformat.read(REPO/f'nbs/pages/{name}.ipynb', 4)
    outputs = [o.data['text/markdown'] for c in nb.cells for o in c.get('outputs', [])]
    return '\n\n'.join([c.source for c in nb.cells if c.cell_type == 'markdown'] + outputs)


def test_the_list_of_chapters_is_made_from_the_notebooks():
    text = shown('chapters')
    for table in (chapter_table(), *map(folder_table, set(BOOK_PARTS) - {'pages'})):
        assert relink(table, '..') in text, 'make readme'
    others = [p for p in (REPO/'nbs').rglob('*.ipynb') if p != REPO/'nbs/pages/chapters.ipynb']
    for p in others:
        rows = re.findall(r'(?m)^\s*"?\|[^|\n]*\| \[[^|\n]*\d\d_\w+/\d\d_\w+\.ipynb', p.read_text())
        assert len(rows) < 20, f'{p.name} holds a second list of the chapters'


def glossary():
    "Terms and what the glossary says of each."
    rows = re.findall(r'(?m)^\| (.+?) \| (.+?) \| (.+?) \|$', shown('glossary'))
    return {term: (meaning, more) for term, meaning, more in rows if term != 'term'}


def test_the_glossary_explains_the_terms_of_the_field():
    found = glossary()
    named = {x.strip().lower() for term in found for x in term.split(',')}
    assert not set(TERMS) - named
    assert len(named) == sum(term.count(',') + 1 for term in found), 'a term stands twice'
    assert list(found) == sorted(found, key=str.lower)
    for term, (meaning, more) in found.items():
        assert len(meaning.split()) > 4 and re.fullmatch(r'\[.+\]\(.+\.ipynb\)', more), term
        assert term.lower() not in meaning.lower().split(', '), term


def test_the_readme_is_read_in_ten_minutes():
    text = (REPO/'README.md').read_text(encoding='utf-8')
    assert len(text.split()) <= 1500, f'{len(text.split())} words'
    assert text.count('![') == 1, 'one picture'
    for p in PAGES: assert f'(nbs/pages/{p.name})' in text, f'README does not lead to {p.name}'


@pytest.mark.parametrize('sign', ['make demo', 'make lab', 'llava-med score ', 'all.base_model=',
    '1_data_prep.articles=', '3b_vqa_tuning.vqa=', '-p vqa ', '--rehearse', '**blank**', '**shuffled**',
    'nbs/course/0_syllabus.ipynb', 'nbs/recipes/how_to_add_a_paper.ipynb', '## What it cannot tell'])
def test_the_readme_shows_a_new_user_the_way(sign):
    assert sign in (REPO/'README.md').read_text(encoding='utf-8')


@pytest.mark.parametrize('page', ['README.md', 'nbs/pages/commands.ipynb'])
def test_commands_that_are_shown_name_what_is_there(page):
    from llava_med.lab.steps import pipeline, read_parameters
    from llava_med.lab.presets import presets
    text = (REPO/page).read_text(encoding='utf-8')
    known = {n: set(read_parameters(p)) for n, p in pipeline().items()}
    for step, parameter in re.findall(r'[ (`](\d\w*|all)\.([a-z]\w*)=', text):
        assert any(parameter in known[n] for n in (known if step == 'all' else [step])), (step, parameter)
    for name in re.findall(r'llava-med (?:run|plan) ([\w/]+)(?![\w/.])', text): assert name in presets(), name
    for f in re.findall(r'papermill (\S+\.ipynb)', text): assert (REPO/f).exists(), f


@pytest.mark.parametrize('module', sorted(library()))
def test_pages_of_modules_name_all_that_is_public(module):
    text = library()[module]
    public = {n.name for n in ast.parse(text).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith('_')}
    page = api_page(module, text, '00_core/02_runs.ipynb')
    assert {d['name'] for d in described(text)} == public and all(f'}} {n}' in page for n in public)
    assert 'After this chapter' not in page.split(':::::')[0]


def test_comments_become_descriptions():
    d = {x['name']: x for x in described((REPO/'llava_med/core/runs.py').read_text())}
    assert d['write_json']['parameters'][0] == ('path', 'str | Path', 'file to write') and d['write_json']['returns'] == 'the file'
    one = described('def f(a:int, b=2)->int: # both\n    "Do."\n    return 1')[0]
    assert one['parameters'] == [('a', 'int', ''), ('b', '', '')]   # one comment for two parameters belongs to neither
    kinds = described('class K:\n    "It."\n    def __init__(self,\n        *a:int, # many\n        k=(1,), # one\n        **kw): # rest\n        ...\n    def m(self): "Do."\n')
    assert kinds[0]['signature'] == '(*a: int, k=(1,), **kw)' and [m['name'] for m in kinds[0]['members']] == ['m']


def test_hidden_cells_stay_out(tmp_path):
    nb = nbformat.v4.new_notebook(cells=[md('# T\n\n> x'), code('#| hide\nsecret'), code('#| default_exp a'), code('#|export\n#| hide_input\nshown'), code('#| echo: false\ndrawn')])
    page = book_page(nb, 'nbs/00_core/02_runs.ipynb', {}, tmp_path)
    assert [c.source for c in page.cells if c.cell_type == 'code'] == ['shown', 'drawn']
    assert page.cells[-1].metadata['tags'] == ['remove-input'] and '#|' not in str(page.cells)


def test_links_become_pages_and_copies(tmp_path):
    there = lambda text, file='nbs/pipeline/1_data_prep.ipynb': book_links(text, file, tmp_path)
    assert there('[a](../03_data/03_articles.ipynb) [b](../../outputs/README.md#x-Y) ![c](https://x.org/a.png)') == '[a](../03_data/03_articles.ipynb) [b](../outputs.md#x-y) ![c](https://x.org/a.png)'
    assert there('[a](presets/tiny.yaml)') == '[a](../files/nbs/pipeline/presets/tiny.yaml)' and (tmp_path/'files/nbs/pipeline/presets/tiny.yaml').exists()
    assert there('[a](pipeline) [b](03_data)', 'nbs/index.ipynb') == '[a](pipeline.md) [b](03_data.md)'
    assert there('`[a](b)` and\n```\n[a](b)\n```') == '`[a](b)` and\n```\n[a](b)\n```'
    for target in ('gone.ipynb', '../../../x', '/etc/hosts', '../../tests'):
        with pytest.raises(UsageError, match='1_data_prep.ipynb: the link'): there(f'[a]({target})')
    assert page_of('README.md') == 'index.ipynb' and page_of('LICENSE') is None and slug('A rule of our own!') == slug('A-rule-of-our-own') == 'a-rule-of-our-own'


def test_names_are_linked_only_where_they_are_sure():
    names = {'run': ['lab.runner'], 'read_run': ['core.runs'], 'load': ['models.llava', 'data.images'], 'Judge': ['evaluate.judge']}
    links = lambda text, own='': re.findall(r'{py:obj}`(\S+) <(\S+)>`', name_links(text, names, own))
    assert links('`run` `read_run` `load` `load()` `none`') == [('read_run', 'llava_med.core.runs.read_run')]
    assert links('`load`, `run()`', 'data.images') == [('load', 'llava_med.data.images.load'), ('run()', 'llava_med.lab.runner.run')]
    assert not links('[`read_run`](x.ipynb) <b title="`read_run`">\n```\n`read_run`\n```')


def test_nothing_is_executed_and_nothing_fetched_by_settings():
    c = configuration()
    assert c['nb_execution_mode'] == 'off' and c['html_math_renderer'] == 'mathml' and not c['nb_ipywidgets_js'] and 'http' not in json.dumps(c)
    assert 'research and teaching only' in c['html_theme_options']['announcement']


# Bad input

def toy(folder, monkeypatch, **pages):
    "A repository with these Markdown notebooks."
    monkeypatch.setenv('LLAVA_MED_ROOT', str(folder))
    (folder/'nbs').mkdir()
    (folder/'settings.ini').write_text('[DEFAULT]\ntitle = T\nversion = 0\nauthor = A\n')
    for name, text in pages.items(): nbformat.write(nbformat.v4.new_notebook(cells=[md(text)]), folder/f'nbs/{name}.ipynb')


def test_a_repository_without_home_page(tmp_path, monkeypatch):
    toy(tmp_path, monkeypatch)
    with pytest.raises(UsageError, match='index.ipynb is missing'): make_book()
    assert book_command([]) == 2 and not (tmp_path/'_docs').exists() and not list(tmp_path.glob('.book*'))


def test_a_link_or_a_chapter_that_is_not_in_order(tmp_path, monkeypatch):
    toy(tmp_path, monkeypatch, index='# T\n\n[A](00_x/01_a.ipynb)')
    with pytest.raises(UsageError, match='the link 00_x/01_a.ipynb leads nowhere'): make_book()
    (tmp_path/'nbs/00_x').mkdir()
    for name in ('00_x/01_a', '00_x/b'):
        nbformat.write(nbformat.v4.new_notebook(cells=[md('# A')]), tmp_path/f'nbs/{name}.ipynb')
    with pytest.raises(UsageError, match='00_x/b.ipynb: a chapter is named NN_package/NN_noun'): make_book()


def test_a_folder_that_is_no_book_is_left_alone(tmp_path, monkeypatch, capsys):
    toy(tmp_path, monkeypatch, index='# T')
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine/thesis.txt').write_text('x')
    assert book_command([str(tmp_path/'mine')]) == 2 and 'holds something that is no book' in capsys.readouterr().err
    assert (tmp_path/'mine/thesis.txt').exists()


def test_the_check_of_links_can_fail(tmp_path):
    (tmp_path/'a.html').write_text('<html><body><a id="x"></a><a href="b.html">b</a><a href="#y">y</a><a href="#x">x</a><a href="https://x.org">far</a>'
                                   '<script src="//cdn.x.org/a.js"></script><img src="data:image/png;base64,AA"></body></html>')
    (tmp_path/'a.css').write_text('@import "https://fonts.x.org/f.css"; b {background: url(//x.org/p.png)} c {background: url(p.png)}')
    found = check_site(tmp_path)
    assert len(found) == 5 and all(any(w in f for f in found) for w in ('b.html leads nowhere', '#y names no place', 'cdn.x.org/a.js would', 'f.css would', 'p.png would'))


@pytest.mark.skipif(bool(NO_BUILDER), reason=NO_BUILDER)
def test_a_link_to_a_heading_that_is_not_there(tmp_path, monkeypatch):
    toy(tmp_path, monkeypatch, index='# T\n\n[a](#gone)')
    (tmp_path/'llava_med').mkdir()
    with pytest.raises(UsageError, match='gone'): make_book(workers=1)
    assert not (tmp_path/'_docs').exists() and not list(tmp_path.glob('.book*'))


# The book itself

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The book, built once: LLAVA_MED_SITE names one that is there."
    if NO_BUILDER: pytest.skip(NO_BUILDER)
    if given := os.environ.get('LLAVA_MED_SITE'): return Path(given).resolve()
    was, begin, cpu = os.environ.get('LLAVA_MED_ROOT'), time.monotonic(), os.times()
    os.environ['LLAVA_MED_ROOT'] = str(REPO)
    try: out = make_book(tmp_path_factory.mktemp('book')/'_docs')
    finally: os.environ.pop('LLAVA_MED_ROOT') if was is None else os.environ.update(LLAVA_MED_ROOT=was)
    spent = os.times()
    print(f'the book in {time.monotonic() - begin:.0f} s, of which this process and its children computed '
          f'{sum(spent[:4]) - sum(cpu[:4]):.0f} s')
    return out


@pytest.mark.slow
def test_the_book_is_whole(site):
    from lxml import html
    assert check_site(site) == []
    pages = {p.relative_to(site).as_posix() for p in site.rglob('*.html')}
    wanted = {p.relative_to(REPO/'nbs').with_suffix('.html').as_posix() for p in (REPO/'nbs').rglob('*.ipynb') if not any(x.startswith(('_', '.')) for x in p.relative_to(REPO).parts)}
    wanted |= {f'api/{m}.html' for m in library()} | {'pages.html', 'contributing.html', 'changelog.html', 'outputs.html', 'data.html', 'search.html', 'genindex.html'}
    assert not wanted - pages
    for p in site.rglob('*.html'):
        if 'files' in p.parts or '_downloads' in p.parts: continue
        page = html.parse(p)
        loaded = [*page.xpath('//script/@src'), *page.xpath('//script/text()'), *page.xpath('//link/@href'), *page.xpath('//style/text()')]
        assert not re.search(r'mathjax|require(\.min)?\.js|cdn\.|googleapis|unpkg|https?://', ' '.join(loaded), re.I), p
        assert 'nothing here may inform the care' in page.getroot().text_content().lower(), p


@pytest.mark.slow
def test_the_order_of_the_pages_is_that_of_the_chapters(site):
    from lxml import html
    shown = [a.get('href') for a in html.parse(site/'index.html').xpath('//div[contains(@class,"sidebar-tree")]//a[contains(@class,"reference")]')]
    rows = [f'{r[2]}.html' for r in chapter_rows()]
    assert [h for h in shown if h in rows] == rows and shown.index('pages.html') < shown.index(rows[0])
    assert shown.index('pipeline.html') > shown.index(rows[-1])


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope='module')
def address(site):
    "The book on a plain web server of this machine."
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


@pytest.fixture(scope='module')
def driver():
    "A browser that notes every request."
    if NO_BROWSER: pytest.skip(NO_BROWSER)
    with browser(performance='ALL', browser='ALL') as d: yield d


@pytest.fixture(scope='module')
def shot(driver, shots):
    "Keep a picture of the page."
    return lambda name: driver.save_screenshot(str(shots/f'book_{name}.png'))


def requests(driver):
    "Addresses that pages have asked for since the last call."
    said = [json.loads(e['message'])['message'] for e in driver.get_log('performance')]
    found = [m['params']['request']['url'] for m in said if m['method'] == 'Network.requestWillBeSent']
    return {u for u in found if not u.startswith(('data:', 'blob:', 'chrome', 'about:', 'devtools:'))}


def size(driver, width, height): driver.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 600))


@pytest.mark.slow
@pytest.mark.parametrize('how', ['server', 'disk'])
def test_search_finds_a_word(driver, shot, address, site, how):
    from selenium.webdriver.common.keys import Keys
    size(driver, 1400, 1100)
    driver.get(f'{address}/index.html' if how == 'server' else (site/'index.html').as_uri())
    box = driver.find_element('css selector', '.sidebar-search')
    box.send_keys('alignment' + Keys.ENTER)
    found = until(lambda: driver.find_elements('css selector', '#search-results li a'))
    until(lambda: 'found' in driver.find_element('css selector', '#search-results').text.lower() or len(found) > 5)
    shot(f'search_{how}')
    targets = {urlsplit(a.get_attribute('href')).path.rsplit('/', 1)[-1] for a in driver.find_elements('css selector', '#search-results li a')}
    assert {'2_stage1_alignment.html', 'glossary.html'} & targets and len(targets) > 3
    hosts = {urlsplit(u).hostname for u in requests(driver)}
    assert hosts <= {'127.0.0.1', None, ''}, hosts


@pytest.mark.slow
def test_pages_light_and_dark_wide_and_narrow(driver, shot, address):
    names = ('index', '00_core/02_runs', '03_data/03_articles', '07_explain/02_maps', '03_data', 'pipeline/4_evaluation', 'pipeline', 'pages/glossary', 'pages/chapters', 'api/models.llava', 'api', 'contributing', 'data')
    for width, height in ((1400, 1100), (390, 844)):
        size(driver, width, height)
        for name in names:
            driver.get(f'{address}/{name}.html')
            until(lambda: driver.execute_script('return document.readyState') == 'complete')
            wide = driver.execute_script('return document.documentElement.scrollWidth')
            assert wide <= width, f'{name} is {wide} wide on a screen of {width}'
            assert driver.find_elements('css selector', 'article h1')
            shot(f'{name.replace("/", "_")}_{width}')
    size(driver, 1400, 1100)
    driver.get(f'{address}/07_explain/02_maps.html')
    light = driver.execute_script('return getComputedStyle(document.body).backgroundColor')
    for theme in ('dark', 'light'):
        driver.execute_script('document.body.dataset.theme = arguments[0]', theme)
        time.sleep(.5)
        shot(f'maps_{theme}')
        if theme == 'dark': assert driver.execute_script('return getComputedStyle(document.body).backgroundColor') != light
    assert driver.find_elements('css selector', '.theme-toggle')
    assert {urlsplit(u).hostname for u in requests(driver)} == {'127.0.0.1'}
    assert not [e for e in driver.get_log('browser') if e['level'] == 'SEVERE' and address in e['message'] and 'favicon' not in e['message']]
