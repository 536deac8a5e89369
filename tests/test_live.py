"Notebooks as JupyterLab runs them: a live kernel that knows a person is watching, and widgets that can be pressed."
import ast
import os
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from conftest import REPO
from llava_med.lab.runner import started

QUICK = ('start', '08_ui/01_widgets', '08_ui/02_panels')
ROOM = REPO/'nbs'
SLOW = sorted(str(p.relative_to(ROOM).with_suffix('')) for d in ('0[0-9]_*', 'pages') for p in ROOM.glob(f'{d}/*.ipynb')
              if not p.name.startswith('_'))
SLOW = [n for n in SLOW if n not in QUICK]


class Live(NotebookClient):
    "A notebook in a kernel with the variables that JupyterLab sets; `press` does what the browser sends."
    def __init__(self, path, **env):
        path = Path(path)
        self.file, self.environment = path, {**os.environ, 'JPY_SESSION_NAME': str(path), 'JPY_PARENT_PID': str(os.getpid()),
            'LLAVA_MED_ROOT': str(REPO), 'PYTHONPATH': os.pathsep.join(filter(None, [str(REPO), os.environ.get('PYTHONPATH')])), **env}
        self.environment.pop('LLAVA_MED_PLAIN', None)
        self.own = dict(timeout=300, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}})
    def run(self, then=lambda live: None):
        "All cells, as Run All Cells does, and then what a person does; the notebook with its outputs."
        def execute(**config):
            nb = nbformat.read(self.file, 4)
            NotebookClient.__init__(self, nb, **self.own, **config)
            with self.setup_kernel(env=self.environment):
                for i, c in enumerate(nb.cells):
                    if c.cell_type == 'code': self.execute_cell(c, i)
                then(self)
            return nb
        return started(execute)
    def ask(self, source):
        "What an expression is, in the kernel."
        self.cell(f'print(repr({source}))')
        return ast.literal_eval(self.nb.cells[-1].outputs[-1].text)
    def cell(self, source):
        "Run another cell."
        self.nb.cells.append(nbformat.v4.new_code_cell(source))
        self.execute_cell(self.nb.cells[-1], len(self.nb.cells) - 1)
    def until(self, source, seconds=60):
        "Wait until an expression is true in the kernel."
        end = time.monotonic() + seconds
        while not (found := self.ask(source)):
            assert time.monotonic() < end, f'{source} was never true'
            time.sleep(.1)
        return found
    def send(self, name, **data):
        "A message of the browser to a widget, `name` in the kernel."
        content = dict(comm_id=self.ask(f'{name}.model_id'), data=data)
        self.kc.shell_channel.send(self.kc.session.msg('comm_msg', content))
    def press(self, name): self.send(name, method='custom', content=dict(event='click'))
    def set(self, name, **state): self.send(name, method='update', state=state, buffer_paths=[])


def widgets_of(nb):
    "How many widgets a notebook shows."
    return sum('application/vnd.jupyter.widget-view+json' in o.get('data', {}) for c in nb.cells if c.cell_type == 'code' for o in c.outputs)


SLOW_TALK = """import time
def counts(image, turns):
    for i in range(600): yield f'{i} '; time.sleep(.05)
slow = Chat({'counts': counts}, {'a phantom': picture}, questions={'a phantom': ['how many?']})"""


def test_the_widgets_chapter_runs_and_its_controls_answer():
    def person(live):
        assert live.ask('(len(chat_box.talk), chat_box.note.value, look.found is not None)') == (2, '', True)
        live.set('chat_box.question', value='a third?')
        live.send('chat_box.question', method='custom', content=dict(event='submit'))   # Enter
        live.until('len(chat_box.talk) == 3')
        live.set('look.layer', value=0)
        live.press('look.examples.children[1]')
        live.until('look.about[0] == items[1]["question"] and not look.busy()')
        assert 'layer 0' in live.ask('look.view.value')
        live.cell(SLOW_TALK)
        live.press('slow.examples.children[0]')
        live.until('"1 " in slow.said.value')   # it answers, and cells run meanwhile
        assert live.ask('(slow.busy(), slow.stop.disabled, slow.picture.disabled, slow.go.disabled)') == (True, False, True, False)
        live.press('slow.go')
        live.until('"Still at work" in slow.note.value')
        live.press('slow.stop')
        live.until('not slow.busy()')
        assert live.ask('slow.talk[0]["stopped"] and "599" not in slow.said.value and "stopped" in slow.said.value')
        assert live.ask('(slow.stop.disabled, slow.picture.disabled)') == (True, False)
    assert widgets_of(Live(ROOM/'08_ui/01_widgets.ipynb').run(person)) == 2


def test_the_panels_chapter_leaves_panels_that_can_be_used():
    def person(live):
        assert live.ask('"image/jpeg" in browse.view.value and len(browse.chosen)') > 0
        live.set('browse.words', value='')
        live.until('len(browse.chosen) == len(items)')
        live.set('browse.kind', index=0)
        live.until('"A radiograph." in browse.view.value')   # the folder is still there
        assert live.ask('("Right answer" in rate.view.value, len(rate.rows))') == (False, 4)
        live.cell("for box in rate.marks: box.value = '5'")
        live.press('rate.go')
        live.until('len(rate.rows) == 6 and "Saved in" in rate.note.value')
        live.press('watch.go')
        assert 'The run has ended' in live.ask('watch.note.value') and live.ask('where.exists()')
    assert widgets_of(Live(ROOM/'08_ui/02_panels.ipynb').run(person)) == 3


def test_the_first_notebook_in_a_live_kernel():
    def person(live):
        assert live.ask('len(talk.talk)') == 2
        live.press('talk.examples.children[0]')
        live.until('len(talk.talk) == 3')
        live.press('look.go')
        live.until('look.stop.disabled and not look.busy()')
        assert live.ask('look.note.value') == ''
    assert widgets_of(Live(ROOM/'start.ipynb').run(person)) >= 2   # and a bar while weights are loaded


@pytest.mark.slow
@pytest.mark.parametrize('name', SLOW)
def test_a_notebook_runs_in_a_live_kernel(name): Live(ROOM/f'{name}.ipynb').run()
