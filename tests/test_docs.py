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
from llava_med.lab.runner import UsageError
from llava_med.lab.book import (BOOK_PARTS, api_page, book_links, book_page, chapter_rows,
    check_site, configuration, described, library, book_command, make_book, name_links,
    package_rows, page_of, parts, slug, words, write_sources)

REPO = Path(__file__).resolve().parents[1]
NO_BUILDER = '' if all(map(find_spec, ('sphinx', 'furo', 'myst_nb'))) else "Sphinx, Furo or MyST-NB is missing (pip install -c constraints.txt -e '.[dev]')"
until = partial(wait_for, seconds=100)   # what may take long on a busy machine
INDEX = REPO/'nbs/index.ipynb'
md, code = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell


# What the pages are made of

def test_every_notebook_has_its_place():
    rows = [r[2] for r in chapter_rows(nbformat.read(INDEX, 4))]
    there = sorted(p.relative_to(REPO/'nbs').with_suffix('').as_posix() for p in (REPO/'nbs').rglob('[0-9]*.ipynb') if p.relative_to(REPO/'nbs').parts[0] not in BOOK_PARTS)
    assert len(there) >= 57
    assert sorted(rows) == there and len(set(rows)) == len(rows)
    assert rows == sorted(rows), 'the reading order is the order of the numbers'
    assert [(f'{int(f[:2])}.{int(f.split("/")[1][:2])}') for f in rows] == [r[0] for r in chapter_rows(nbformat.read(INDEX, 4))]
    assert {f.split('/')[0] for f in rows} == set(package_rows(nbformat.read(INDEX, 4)))
    listed = [f for files in parts().values() for f in files]
    assert sorted(listed) == sorted(p.relative_to(REPO/'nbs').as_posix() for d in BOOK_PARTS for p in (REPO/'nbs'/d).rglob('*.ipynb')
                                    if not any(x.startswith(('_', '.')) for x in p.relative_to(REPO).parts))


def test_the_course_is_read_in_its_order():
    files = parts()['course']
    assert files[0] == 'course/0_syllabus.ipynb'
    for n in '123456':
        lecture, exercises = [f for f in files if re.match(rf'course/{n}_', f)]
        assert exercises == f'course/{n}_exercises.ipynb' != lecture, 'exercises come after their lecture'


def test_every_word_has_a_meaning():
    found = words(nbformat.read(INDEX, 4))
    assert 'alignment' in dict(found) and all(w and m for w, m in found) and len(dict(found)) == len(found)


@pytest.mark.parametrize('module', sorted(library()))
def test_pages_of_modules_name_all_that_is_public(module):
    text = library()[module]
    public = {n.name for n in ast.parse(text).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith('_')}
    page = api_page(module, text, '00_core/01_runs.ipynb')
    assert {d['name'] for d in described(text)} == public and all(f'}} {n}' in page for n in public)
    assert 'After this chapter' not in page


def test_comments_become_descriptions():
    d = {x['name']: x for x in described((REPO/'llava_med/core/runs.py').read_text())}
    assert d['write_json']['parameters'][0] == ('path', 'str | Path', 'file to write') and d['write_json']['returns'] == 'the file'
    one = described('def f(a:int, b=2)->int: # both\n    "Do."\n    return 1')[0]
    assert one['parameters'] == [('a', 'int', ''), ('b', '', '')]   # one comment for two parameters belongs to neither
    kinds = described('class K:\n    "It."\n    def __init__(self,\n        *a:int, # many\n        k=(1,), # one\n        **kw): # rest\n        ...\n    def m(self): "Do."\n')
    assert kinds[0]['signature'] == '(*a: int, k=(1,), **kw)' and [m['name'] for m in kinds[0]['members']] == ['m']


def test_hidden_cells_stay_out(tmp_path):
    nb = nbformat.v4.new_notebook(cells=[md('# T\n\n> x'), code('#| hide\nsecret'), code('#| default_exp a'), code('#|export\n#| hide_input\nshown'), code('#| echo: false\ndrawn')])
    page = book_page(nb, 'nbs/00_core/01_runs.ipynb', {}, tmp_path)
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


def test_a_table_that_lists_too_much_or_too_little(tmp_path, monkeypatch):
    toy(tmp_path, monkeypatch, index='# T\n\n| 0 | **x** | y |\n| 0.1 | [A](00_x/01_a.ipynb) | x |')
    with pytest.raises(UsageError, match='lists 00_x/01_a.ipynb, which is not there|the link 00_x/01_a.ipynb leads nowhere'): make_book()
    (tmp_path/'nbs/00_x').mkdir()
    for name in ('00_x/01_a', '00_x/02_b'): nbformat.write(nbformat.v4.new_notebook(cells=[md('# A')]), tmp_path/f'nbs/{name}.ipynb')
    with pytest.raises(UsageError, match='its table lacks 00_x/02_b.ipynb'): make_book()


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
    wanted |= {f'api/{m}.html' for m in library()} | {'glossary.html', 'contributing.html', 'changelog.html', 'outputs.html', 'data.html', 'search.html', 'genindex.html'}
    assert not wanted - pages
    for p in site.rglob('*.html'):
        if 'files' in p.parts or '_downloads' in p.parts: continue
        page = html.parse(p)
        loaded = [*page.xpath('//script/@src'), *page.xpath('//script/text()'), *page.xpath('//link/@href'), *page.xpath('//style/text()')]
        assert not re.search(r'mathjax|require(\.min)?\.js|cdn\.|googleapis|unpkg|https?://', ' '.join(loaded), re.I), p
        assert 'nothing here may inform the care' in page.getroot().text_content().lower(), p


@pytest.mark.slow
def test_the_order_of_the_pages_is_that_of_the_home_page(site):
    from lxml import html
    shown = [a.get('href') for a in html.parse(site/'index.html').xpath('//div[contains(@class,"sidebar-tree")]//a[contains(@class,"reference")]')]
    rows = [f'{r[2]}.html' for r in chapter_rows(nbformat.read(INDEX, 4))]
    assert [h for h in shown if h in rows] == rows and shown.index('pipeline.html') > shown.index(rows[-1])


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
    names = ('index', '00_core/01_runs', '03_data/03_articles', '07_explain/02_maps', '03_data', 'pipeline/4_evaluation', 'pipeline', 'glossary', 'api/models.llava', 'api', 'contributing', 'data')
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
