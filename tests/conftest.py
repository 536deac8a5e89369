"Shared by all tests: the repository, its notebooks, small pipelines to break, and helpers that start or await processes."
import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from shutil import which

import nbformat
import pytest

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
CHROMIUM = next(filter(None, map(which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
DRIVER = which('chromedriver')
try: import selenium
except ImportError: selenium = None
NO_BROWSER = ('no Chromium is installed (Debian: apt install chromium chromium-driver)' if not CHROMIUM else 'no chromedriver is installed (Debian: '
              'apt install chromium-driver)' if not DRIVER else "selenium is not installed (pip install -c constraints.txt -e '.[dev]')" if not selenium else '')


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes minutes; make test-all runs it')
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)   # a background job ignores Ctrl-C, and so would what the tests start and interrupt


@pytest.fixture(autouse=True)
def own_outputs(monkeypatch, tmp_path):
    "No test writes into the repository's outputs/, whatever the environment says."
    monkeypatch.setenv('LLAVA_MED_ROOT', str(REPO))
    monkeypatch.setenv('LLAVA_MED_OUTPUTS', str(tmp_path/'outputs'))
    monkeypatch.delenv('LLAVA_MED_RUNNER', raising=False)
    monkeypatch.setenv('JUPYTER_PLATFORM_DIRS', '1')


@pytest.fixture
def repo(): return REPO


@pytest.fixture
def forks(monkeypatch):
    "Gives processes that are forks of a server which has imported some modules once; the server of an earlier test knows others."
    def context(*modules):
        monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(REPO), str(REPO/'tests')]))
        forkserver._forkserver._stop()
        found = multiprocessing.get_context('forkserver')
        found.set_forkserver_preload(list(modules))
        return found
    return context


def browser(width=1400, height=1100, **logs):
    "Chromium without a screen, for a `with`; `logs` says which of its logs are kept, such as browser='ALL'."
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    if logs: options.set_capability('goog:loggingPrefs', logs)
    for f in ('--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update '
              f'--disable-sync --disable-dev-shm-usage --force-device-scale-factor=1 --window-size={width},{height}').split(): options.add_argument(f)
    d = webdriver.Chrome(options=options, service=Service(DRIVER))
    d.set_page_load_timeout(100)
    return d


@pytest.fixture(scope='module')
def shots(tmp_path_factory):
    "Where screenshots go: LLAVA_MED_SHOTS, or a temporary folder."
    folder = Path(os.environ.get('LLAVA_MED_SHOTS') or tmp_path_factory.mktemp('shots'))
    folder.mkdir(parents=True, exist_ok=True)
    print(f'screenshots in {folder}')
    return folder


def make_notebook(path, *sources, tags=('parameters',)):
    "A notebook of these code cells; the first one gets the tags."
    cells = [nbformat.v4.new_code_cell(s, id=f'cell{i}') for i, s in enumerate(sources)]
    cells[0].metadata['tags'] = list(tags)
    path.parent.mkdir(parents=True, exist_ok=True)
    kernel = {'name': 'python3', 'display_name': 'python3', 'language': 'python'}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={'kernelspec': kernel}), path)
    return path


PARAMETERS = """run: str = 'scratch'  # the run to write
inputs_from: str = 'tiny'  # the run to read
seed: int = 0  # not used
lr: float = 1e-3  # step size
n: int = 1  # a number
tag: str = 'a'  # a word
files: list = []  # data to read
"""
HEAD = 'import os, sys, time\nfrom llava_med.core.runs import run_dir, read_json, write_json'


class Toy:
    "A repository with a pipeline of three notebooks, each of which notes its parameters and reads the one before."
    steps = ('1_one', '2_two', '3_three')

    def __init__(self, folder, monkeypatch):
        self.root, self.outputs = folder, folder/'outputs'
        monkeypatch.setenv('LLAVA_MED_ROOT', str(folder))
        monkeypatch.setenv('LLAVA_MED_OUTPUTS', str(self.outputs))
        monkeypatch.setattr('llava_med.lab.runner.library_fingerprint', lambda nb: 'the same library')
        (folder/'nbs/pipeline/presets').mkdir(parents=True)
        (folder/'settings.ini').write_text('[DEFAULT]\n')
        for s in self.steps: self.step(s)
        self.preset('toy', 'description: Three steps.\n')

    def preset(self, name, text): (self.root/f'nbs/pipeline/presets/{name}.yaml').write_text(text)
    def notebook(self, step): return self.root/f'nbs/pipeline/{step}.ipynb'

    def step(self, name, work='', ledger=True, tags=('parameters',), parameters=PARAMETERS):
        "A step that does `work` between its beginning and its end."
        before = dict(zip(self.steps[1:], self.steps)).get(name)
        read = f"read_json(run_dir(run)/'{before}'/'out.json')" if before else 'None'
        end = f"write_json(run_dir(run)/'{name}'/'out.json', dict(lr=lr, n=n, tag=tag, files=files, python=sys.executable, before={read}))"
        if ledger: end += f"\nwrite_json(run_dir(run)/'{name}'/'ledger.json', {{}})"
        make_notebook(self.notebook(name), parameters, HEAD, work or 'print("working")', end, tags=tags)

    def run(self, *words):
        "The exit code of `llava-med run …`."
        from llava_med.lab.commands import main
        return main(['run', *words])

    def out(self, step, run='toy'):
        from llava_med.core.runs import read_json
        return read_json(self.outputs/run/step/'out.json')

    def record(self, run='toy'):
        from llava_med.core.runs import read_run
        return read_run(run)['steps']

    def ended(self, run='toy'): return {s: r.get('ended') for s, r in self.record(run).items()}


@pytest.fixture
def toy(tmp_path, monkeypatch): return Toy(tmp_path, monkeypatch)


def wait_for(what, seconds=60):
    "Wait until it is true, and return it."
    end = time.monotonic() + seconds
    while not (found := what()):
        if time.monotonic() > end: raise TimeoutError('it never came true')
        time.sleep(.05)
    return found


@contextlib.contextmanager
def dask_processes(env, n_workers, folder, *words):
    "A scheduler and workers as they are started on several machines: (address, workers)."
    file, started = folder/'scheduler.json', []
    def start(*words): started.append(subprocess.Popen([sys.executable, '-m', 'dask', *words], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)); return started[-1]
    try:
        start('scheduler', '--host', '127.0.0.1', '--port', '0', '--no-dashboard', '--scheduler-file', str(file))
        workers = [start('worker', '--scheduler-file', str(file), '--host', '127.0.0.1', '--nthreads', '1', '--no-nanny', '--no-dashboard',
                         '--local-directory', str(folder), *words) for _ in range(n_workers)]
        wait_for(lambda: file.exists() and file.stat().st_size, 90)   # a file that is still empty says nothing
        yield json.loads(file.read_text())['address'], workers
    finally:
        for p in started[::-1]: p.kill(); p.wait()
