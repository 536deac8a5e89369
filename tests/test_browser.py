"JupyterLab in a browser without a screen: the first notebook and every panel, as a student meets them."
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import nbformat
import pytest
from PIL import Image

from conftest import NO_BROWSER, browser

REPO = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(NO_BROWSER), reason=NO_BROWSER)]
PATIENCE = 100   # seconds for what may take long on a busy machine
TUNED = (REPO/'data/tuned_tiny/config.json').exists()

CHAPTERS = {'08_ui/01_widgets': ('Two panels whose parts have names', 'layer 1 of 0 to'), '08_ui/02_panels': ('Three panels that read', 'losses')}
SIZES = ((1400, 900), (1024, 700))
PANELS = """from pathlib import Path
import os
from llava_med.ui.panels import Browse, Compare, Watch
from llava_med.core.runs import read_jsonl, run_dir
from llava_med.data.vqa import read_items
data = run_dir('toy')/'1_data_prep'
items = read_items(data/'vqa/test.json')
browse = Browse(data)
browse
===
said = {'base': {o['id']: 'no' for o in items}, 'stage2': {o['id']: o['answer'] + '.' for o in items}}
rate = Compare(items, said, data/'images', run_dir('toy')/'marks.jsonl', seed=1)
rate
===
watch = Watch('toy', every=.5)
watch
===
missing = Watch('never')
missing"""


def write_toy(outputs):
    "A run with two pictures and their questions, in which a step is running; the test's own process holds it."
    from llava_med.world.render import render
    from llava_med.world.language import questions
    from llava_med.world.scenes import sample_scene
    from llava_med.core.runs import write_json
    items = []
    for seed in (24, 26):
        scene = sample_scene(seed, 'test', 'chest_xray')
        items += questions(scene)
        image = outputs/'toy/1_data_prep/images'/items[-1]['images'][0]
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(render(scene)).save(image)
    write_json(outputs/'toy/1_data_prep/vqa/test.json', items)
    write_json(outputs/'toy/.owner.json', dict(pid=os.getpid(), host=socket.gethostname()))
    write_json(outputs/'toy/run.json', dict(steps={'2_stage1_alignment': dict(state='running')}))
    write_json(outputs/'toy/2_stage1_alignment/.checkpoint/progress.json', dict(rows=[dict(step=i, loss=4 - i/100) for i in range(60)]))
    return items


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "JupyterLab on a free port, below a path as JupyterHub gives it: its address, and the folder that it shows."
    folder = tmp_path_factory.mktemp('lab')
    (folder/'config/labconfig').mkdir(parents=True)
    (folder/'config/labconfig/page_config.json').write_text('{"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": true}}')
    settings = folder/'settings/@jupyterlab/notebook-extension'
    settings.mkdir(parents=True)
    (settings/'tracker.jupyterlab-settings').write_text('{"windowingMode": "none"}')   # every cell is on the page
    work = folder/'work'
    work.mkdir()
    for name in ('start', *CHAPTERS):
        nb = nbformat.read(REPO/f'nbs/{name}.ipynb', 4)
        for c in nb.cells:
            if c.cell_type == 'code': c.outputs = []
        nbformat.write(nb, work/f'{Path(name).name}.ipynb')
    kernel = {'name': 'python3', 'display_name': 'python3', 'language': 'python'}
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in PANELS.split('\n===\n')], metadata={'kernelspec': kernel}), work/'panels.ipynb')
    write_toy(folder/'outputs')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = {**os.environ, 'JUPYTER_CONFIG_DIR': str(folder/'config'), 'JUPYTERLAB_SETTINGS_DIR': str(folder/'settings'), 'LLAVA_MED_ROOT': str(REPO),
           'LLAVA_MED_OUTPUTS': str(folder/'outputs'), 'JUPYTERLAB_WORKSPACES_DIR': str(folder/'workspaces'), 'JUPYTER_PREFER_ENV_PATH': '1',
           'PYTHONPATH': os.pathsep.join(filter(None, [str(REPO), os.environ.get('PYTHONPATH')]))}
    with open(folder/'log.txt', 'w') as log:
        p = subprocess.Popen([sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', f'--ServerApp.port={port}', '--ServerApp.port_retries=0',
            '--ServerApp.ip=127.0.0.1', '--IdentityProvider.token=', f'--ServerApp.root_dir={work}', '--ServerApp.base_url=/user/ada/', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate'],
            env=env, cwd=work, stdout=log, stderr=subprocess.STDOUT)
    address = f'http://127.0.0.1:{port}/user/ada'
    for _ in range(PATIENCE):
        try: urlopen(f'{address}/api', timeout=2); break
        except OSError: time.sleep(1)
        if p.poll() is not None: break
    else: p.kill()
    assert p.poll() is None, (folder/'log.txt').read_text()[-2000:]
    yield address, work
    p.terminate()
    try: p.wait(20)
    except subprocess.TimeoutExpired: p.kill()


@pytest.fixture(scope='module')
def driver():
    "The browser."
    with browser() as d: yield d


class Page:
    "A notebook in the browser, and what a person can find and do on it."
    def __init__(self, driver, lab, name, shots):
        self.driver, self.file, self.shots = driver, lab[1]/name, shots
        driver.get(f'{lab[0]}/lab/tree/{name}?reset')
        self.find('//*[contains(@class,"jp-Notebook")]//*[contains(@class,"jp-Cell")]')
        self.find('//*[@id="jp-main-statusbar"]//*[contains(text(),"| Idle")]')   # the kernel has started
    def until(self, test, patience=PATIENCE):
        "Wait until something holds; a page that is being redrawn is asked again."
        from selenium.common.exceptions import WebDriverException
        end = time.monotonic() + patience
        while True:
            try: found = test()
            except WebDriverException: found = None
            if found: return found
            if time.monotonic() > end:
                self.shot('failed')
                raise AssertionError(f'it did not come about: {self.text()[-1500:]}')
            time.sleep(.3)
    def all(self, xpath): return [e for e in self.driver.find_elements('xpath', xpath) if e.is_displayed()]
    def find(self, xpath, n=0, patience=PATIENCE): return self.until(lambda: len(self.all(xpath)) > n and self.all(xpath)[n], patience)
    def field(self, label, n=0, kind='*'): return self.find(f'//label[normalize-space()="{label}"]/following-sibling::{kind}', n)
    def button(self, text, n=0): return self.find(f'//button[normalize-space()="{text}"]', n)
    def text(self): return self.driver.find_element('css selector', '.jp-Notebook').text
    def says(self, words): self.until(lambda: words in self.text())
    def alts(self): return [e.get_attribute('alt') or '' for e in self.driver.find_elements('css selector', '.jp-Notebook .widget-html img')]
    def shows(self, words): return self.until(lambda: next((a for a in self.alts() if words in a), None))
    def press(self, element):
        self.driver.execute_script('arguments[0].scrollIntoView({block: "center"})', element)
        time.sleep(.2)
        element.click()
    def run_all(self):
        self.find('//div[contains(@class,"lm-MenuBar-itemLabel")][normalize-space()="Run"]').click()
        self.find('//div[contains(@class,"lm-Menu-itemLabel")][normalize-space()="Run All Cells"]').click()
    def shot(self, name): self.driver.save_screenshot(str(self.shots/f'{self.file.stem}_{name}.png'))
    def save(self):
        "Save the notebook, as Ctrl-S does, and read the file."
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.keys import Keys
        before = self.file.stat().st_mtime_ns
        ActionChains(self.driver).key_down(Keys.CONTROL).send_keys('s').key_up(Keys.CONTROL).perform()
        self.until(lambda: self.file.stat().st_mtime_ns > before)
        time.sleep(1)
        return self.file.read_text()
    def choose_file(self, button, path):
        "Give a file to an upload button, as the dialogue of the system would."
        self.driver.execute_script("""const was = HTMLInputElement.prototype.click;
            HTMLInputElement.prototype.click = function() { if (this.type !== 'file') return was.call(this);
                this.id = 'the-file'; this.style.display = 'block'; document.body.appendChild(this); }""")
        self.press(button)
        self.until(lambda: self.driver.find_elements('css selector', '#the-file'))
        self.driver.find_element('css selector', '#the-file').send_keys(str(path))
        self.driver.execute_script("document.getElementById('the-file').style.display = 'none'; document.getElementById('the-file').removeAttribute('id')")


@pytest.fixture(scope='module')
def start(driver, lab, shots):
    "The first notebook, all cells run."
    page, begin = Page(driver, lab, 'start.ipynb', shots), time.monotonic()
    page.run_all()
    page.shows('layer 2')
    print(f'all cells of start.ipynb in {time.monotonic() - begin:.0f} s')
    page.until(lambda: page.file.exists() and 'What you have now' in page.text())
    return page


def test_all_cells_of_start_run(start):
    assert 'Traceback' not in start.text() and 'Error displaying widget' not in start.text() and not start.driver.find_elements('css selector', '.jp-OutputArea [data-mime-type="application/vnd.jupyter.stderr"] .ansi-red-fg')
    if not TUNED: start.says('data/tuned_tiny is missing')
    start.says('For research and teaching only')
    start.shot('all_cells')


def test_a_question_is_asked_with_the_keyboard(start):
    from selenium.webdriver.common.keys import Keys
    box = start.field('Question', kind='input')
    start.press(box)
    box.send_keys('is a pneumothorax visible?' + Keys.ENTER)
    said = lambda: next((e.text for e in start.all('//*[@aria-live="polite"]/p') if 'is a pneumothorax visible?' in e.text and '(stage 2' in e.text), '')
    answer = start.until(said).splitlines()[1].replace('(stage 2, tiny)', '').strip()
    if TUNED: assert answer in ('yes', 'no')
    start.until(lambda: start.field('Question', kind='input').get_attribute('value') == '')
    start.press(start.button('Ask'))
    start.says('The question is empty')
    start.shot('chat')


def test_a_slider_is_moved_with_the_keyboard(start):
    from selenium.webdriver.common.keys import Keys
    before = start.shows('layer 2')
    handle = start.find('//*[contains(@class,"noUi-handle")]')
    assert handle.get_attribute('tabindex') == '0'
    handle.send_keys(Keys.ARROW_RIGHT)
    after = start.shows('layer 3')
    assert before.replace('layer 2', '') == after.replace('layer 3', '')
    words = start.all('//*[contains(@class,"widget-toggle-buttons")]//button')
    start.press(words[1])
    start.shows(f'of “{words[1].text.strip()}”')
    start.says('The five highest patches')
    start.shot('explore')


def test_an_example_is_asked_with_the_keyboard_alone_and_stop_is_heard(start):
    from selenium.webdriver.common.keys import Keys
    example = start.button('where is the consolidation, left or right?')
    start.driver.execute_script('arguments[0].focus()', example)
    example.send_keys(Keys.ENTER)
    start.until(lambda: any('where is the consolidation, left or right?' in e.text and '(stage 2' in e.text for e in start.all('//*[@aria-live="polite"]/p')))
    assert start.driver.switch_to.active_element.text == 'where is the consolidation, left or right?', 'the focus stays where it was'
    stop = start.button('Stop')
    start.until(lambda: not stop.is_enabled())


def cut_off(page):
    "Controls of panels that reach beyond the right edge of their panel, as texts."
    return page.driver.execute_script("""return [...document.querySelectorAll('.jp-Notebook .llava-panel')].flatMap(p => {
        const edge = p.getBoundingClientRect().right + 1;
        return [...p.querySelectorAll('button, input, select, img')].filter(e => e.offsetParent && e.getBoundingClientRect().right > edge)
            .map(e => e.tagName + ' ' + (e.textContent || e.alt || e.placeholder || '').slice(0, 40)); })""")


def test_nothing_is_cut_off_on_a_small_screen(start):
    try:
        for w, h in SIZES:
            start.driver.set_window_size(w, h)
            for k, panel in enumerate(start.driver.find_elements('css selector', '.jp-Notebook .llava-panel')):
                start.driver.execute_script('arguments[0].scrollIntoView({block: "start"})', panel)
                time.sleep(.5)
                start.shot(f'panel{k}_{w}')
            assert not cut_off(start), w
    finally: start.driver.set_window_size(1400, 1100)


def test_an_uploaded_picture_is_not_saved(start, tmp_path):
    noise = os.urandom(96*96*3)
    path = tmp_path/'Doe_Jane.png'
    Image.frombytes('RGB', (96, 96), noise).save(path)
    start.choose_file(start.button('Your own picture (0)'), path)
    drawn = start.shows('your picture, 96 × 96 pixels')
    from selenium.webdriver.support.ui import Select
    start.until(lambda: Select(start.field('Picture', kind='select')).first_selected_option.text == 'your own, uploaded')
    start.says('New talk')
    assert drawn and 'Doe_Jane' not in start.driver.page_source
    source = next(e.get_attribute('src') for e in start.driver.find_elements('css selector', '.widget-html img') if 'your picture' in (e.get_attribute('alt') or ''))
    start.shot('upload')
    saved = start.save()
    code = source.split('base64,')[1]
    assert len(code) > 2000 and code[:200] not in saved and code[-200:] not in saved
    assert 'Doe_Jane' not in saved and 'widgets' not in json.loads(saved)['metadata']
    assert json.loads(saved)['cells'][7]['outputs'], 'the file was saved after the cells had run'


def test_a_file_that_is_no_picture(start, tmp_path):
    (tmp_path/'no.png').write_text('no picture')
    start.choose_file(start.button('Your own picture (0)'), tmp_path/'no.png')
    start.says('not an image of a known format')
    start.shows('your picture, 96 × 96 pixels')   # the one before is still there


def test_panels(driver, lab, shots):
    from llava_med.core.runs import read_jsonl, update_run, write_json
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select
    page, run = Page(driver, lab, 'panels.ipynb', shots), lab[1].parent/'outputs/toy'
    page.run_all()
    page.says('There is no run in')
    # Browse
    left = lambda: next((e.text for e in page.all('//*[contains(@class,"widget-html-content")]//span') if 'that fit' in e.text), None)
    n = page.until(left)
    Select(page.field('Type', kind='select')).select_by_visible_text('side')
    page.until(lambda: left() not in (n, None))
    box = page.field('Contains', kind='input')
    page.press(box); box.send_keys('no such words' + Keys.ENTER)
    page.says('No record fits')
    page.shot('browse')
    # Compare
    assert 'Answer A' in page.text() and 'stage2' not in ' '.join(e.text for e in page.all('//*[contains(@class,"widget-html")]'))
    assert 'Right answer' not in page.text(), 'whoever sees the key does not mark blindly'
    page.press(page.button('Save and go on'))
    page.says('Answer A has no mark yet')
    for label, mark in (('Answer A', '3'), ('Answer B', '9')): Select(page.field(label, kind='select')).select_by_visible_text(mark)
    page.press(page.button('Save and go on'))
    page.says('Saved in marks.jsonl')
    page.shot('compare')
    assert sorted(read_jsonl(run/'marks.jsonl')[0]['result'].split()) == ['3', '9']
    # Watch: the run goes on in another process than the notebook's, here the test's
    page.shows('60 losses')
    write_json(run/'2_stage1_alignment/.checkpoint/progress.json', dict(rows=[dict(step=i, loss=4 - i/100) for i in range(200)]))
    page.shows('200 losses')
    write_json(run/'run.json', dict(steps={'2_stage1_alignment': dict(state='done')}))
    (run/'.owner.json').unlink()
    page.says('The run has ended')
    ticked = lambda: [e.is_selected() for e in page.driver.find_elements('xpath', '//label[contains(., "Refresh by itself")]//input')]
    page.until(lambda: ticked() and not any(ticked()))
    page.shot('watch')
    assert 'Traceback' not in page.text()


@pytest.mark.parametrize('name', CHAPTERS)
def test_a_chapter_of_widgets_runs_in_jupyterlab(name, driver, lab, shots):
    page, (end, shown) = Page(driver, lab, f'{Path(name).name}.ipynb', shots), CHAPTERS[name]
    page.run_all()
    page.shows(shown)
    page.until(lambda: page.all('//*[@id="jp-main-statusbar"]//*[contains(text(),"| Idle")]'))
    assert 'Traceback' not in page.text() and 'Error displaying widget' not in page.text()
    assert len(page.driver.find_elements('css selector', '.jp-Notebook .llava-panel')) == (2 if 'widgets' in name else 3)
    try:
        for w, h in SIZES:
            driver.set_window_size(w, h)
            for k, panel in enumerate(page.driver.find_elements('css selector', '.jp-Notebook .llava-panel')):
                driver.execute_script('arguments[0].scrollIntoView({block: "start"})', panel)
                time.sleep(.5)
                page.shot(f'panel{k}_{w}')
            assert not cut_off(page), w
    finally: driver.set_window_size(1400, 1100)


def test_the_sample_of_the_data(driver, shots, tmp_path):
    "The page that data preparation leaves: keys j and k turn it over, and nothing is fetched."
    from llava_med.data.browse import sample_page
    items = write_toy(tmp_path)
    figures = [dict(id=n, image=n, caption='A radiograph.', modalities={'chest_xray': True}, mentions=[]) for n in dict.fromkeys(o['images'][0] for o in items)]
    sample_page(tmp_path/'sample.html', figures, [], tmp_path/'toy/1_data_prep/images')
    driver.get(os.environ.get('LLAVA_MED_SAMPLE') or (tmp_path/'sample.html').as_uri())
    body = driver.find_element('css selector', 'body')
    shown = driver.find_element('css selector', '#count').text
    assert shown.endswith('shown') and driver.find_elements('css selector', 'article img[alt]')
    body.send_keys('j')
    assert driver.switch_to.active_element.tag_name == 'article'
    assert all(r.startswith(('data:', 'file:')) for r in driver.execute_script('return performance.getEntriesByType("resource").map(r => r.name)'))
    driver.save_screenshot(str(shots/'sample.png'))
